"""Which interface leads where, as this machine's kernel says."""

import socket

import psutil
import pytest

from dapo_megatron.errors import ConfigError
from launch.network import interface_towards, require_interface


def test_towards_itself_it_is_the_interface_of_the_address():
    for name, addresses in psutil.net_if_addrs().items():
        for address in (a.address for a in addresses if a.family == socket.AF_INET):
            assert interface_towards(address) == name
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == "lo"


def test_an_unknown_host_or_interface_is_one_line():
    with pytest.raises(ConfigError, match="no route to nowhere.invalid") as e:
        interface_towards("nowhere.invalid")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="launch.interface=ib77 is no interface of .*: choose of .*lo"):
        require_interface("ib77")
    require_interface("lo")
