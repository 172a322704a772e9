"""Reserved ports: nobody gets one by chance, and a server that asks for it does."""

import errno
import socket
import struct

import pytest
import torch.distributed as dist
import zmq

from launch.ports import LOCALHOST, reserved_ports

IP_LOCAL_PORT_RANGE = 51  # linux/in.h, since Linux 6.3: bounds the ports that the kernel chooses from


def any_port_out_of(port):
    """A socket for which the kernel has one port to choose."""
    s = socket.socket()
    s.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    return s


@pytest.fixture
def port():
    try:
        any_port_out_of(40000).close()
    except OSError:
        pytest.skip("this kernel chooses ports from one range for all sockets (needs Linux 6.3)")
    with reserved_ports(1) as (port,):
        yield port


def test_no_listener_gets_it_by_chance(port):
    with any_port_out_of(port) as s, pytest.raises(OSError) as failure:
        s.bind((LOCALHOST, 0))
    assert failure.value.errno == errno.EADDRINUSE


def test_no_connection_gets_it_by_chance(port):
    with socket.create_server((LOCALHOST, 0)) as server, any_port_out_of(port) as s, pytest.raises(OSError) as failure:
        s.connect(server.getsockname())
    assert failure.value.errno == errno.EADDRNOTAVAIL


def test_it_is_free_afterwards():
    with reserved_ports(1) as (port,):
        pass
    with socket.create_server((LOCALHOST, port)):
        pass


def test_the_servers_it_is_for_get_it():
    with reserved_ports(3) as (http, link, store):
        with socket.create_server((LOCALHOST, http)):  # as asyncio, and with it uvicorn, does
            pass
        with zmq.Context() as context, context.socket(zmq.REP) as replies:
            replies.bind(f"tcp://{LOCALHOST}:{link}")
        dist.TCPStore(LOCALHOST, store, 1, is_master=True)
