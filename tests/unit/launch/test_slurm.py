"""What the launcher of a SLURM job makes of its nodes, of signals and of the clock."""

import signal
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dapo_megatron.errors import ConfigError
from launch import slurm
from launch.allocation import Group, Node, read_allocation
from launch.environment import VISIBLE
from launch.slurm import TERMINATED, _also_by_clock, _pools, _supervised, address_of, run_slurm
from launch.states import End, StopAsked
from tests.tiny import run_config
from tests.unit.launch.test_allocation import recorded

ALLOCATION = replace(read_allocation(*recorded("no_devices")), ends=None)
DONE = End(None, "")


def run_of(tmp_path, **launch):
    config = run_config("nowhere", data={"train": "nowhere.jsonl"}, launch=launch)
    return config.model_copy(update={"run_dir": str(tmp_path)})


def stand_in(monkeypatch, **functions):
    for name, function in functions.items():
        monkeypatch.setattr(slurm, name, function)


def test_nodes_that_nobody_needs_are_spare_and_take_the_place_of_others(tmp_path, monkeypatch):
    found = []
    group = Group(7, tuple(Node(f"node{k}", 4, 0) for k in range(1, 5)))
    stand_in(
        monkeypatch,
        find_allocation=lambda _: replace(ALLOCATION, groups=(group,)),
        is_in=lambda _: True,
        address_of=lambda host: f"10.0.0.{host[-1]}",
        check_job_inputs=lambda _: None,
        write_report=lambda _: None,
        _supervised=lambda *arguments: found.extend(arguments[-3:]) or DONE,
    )
    run_slurm(run_of(tmp_path, engine_nodes=1))
    plan, slots, spares = found
    assert (slots, spares) == (("node1", "node4"), ("node2", "node3"))
    placement = plan(("node3", "node4"))
    assert placement.ranks[0].node.name == "node3" and placement.urls[0].startswith("http://10.0.0.4:")


def test_the_time_limit_counts_from_now_on(tmp_path, monkeypatch):
    ends = time.time() + 500
    stand_in(monkeypatch, find_allocation=lambda _: replace(ALLOCATION, ends=ends))
    with pytest.raises(ConfigError, match=r"save_before_end_s=600 leaves nothing of a job of (500|499) s"):
        run_slurm(run_of(tmp_path, save_before_end_s=600))


def test_a_node_replaces_one_of_its_group_with_as_many_gpus():
    groups = (Group(7, (Node("a", 4, 8), Node("b", 4, 8), Node("c", 4, 2))), Group(8, (Node("d", 4, 8),)))
    pools = _pools(replace(ALLOCATION, groups=groups))
    assert pools["a"] == pools["b"] and len({pools[name] for name in "acd"}) == 3


@pytest.mark.parametrize("interface", [None, "eth7"])
@pytest.mark.parametrize(
    ("number", "comes_back"), [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGINT, False)]
)
def test_what_steps_get_of_the_batch_script_and_what_a_signal_asks_for(
    tmp_path, monkeypatch, interface, number, comes_back
):
    got = {}

    class Steps:
        def __init__(self, group, folder, allocation, base, towards, container):
            got.update(base=base, towards=towards)

        def close(self):
            got["closed"] = True

    class Supervisor:
        def __init__(self, *_, **options):
            got["spares"] = options["spares"]

        def run(self, asked):
            signal.raise_signal(number)
            return asked()

    placement = SimpleNamespace(cpu=True, controller=SimpleNamespace(node=SimpleNamespace(address="10.0.0.1")))
    stand_in(
        monkeypatch,
        Steps=Steps,
        Supervisor=Supervisor,
        ProcessGroup=lambda *_, **__: nullcontext(),  # the real one ends whatever pytest has started
        unfit_nodes=lambda *_: None,
        ending=lambda _: None,
    )
    monkeypatch.setenv(VISIBLE, "3")  # the batch script's: other nodes' devices have other numbers
    monkeypatch.setenv("KEPT", "1")
    config = run_of(tmp_path, interface=interface)
    folder = slurm.RunFolder(tmp_path)
    asked = _supervised(config, folder, None, ALLOCATION, lambda _: placement, ("node1",), ("node2",))
    assert isinstance(asked, StopAsked) and asked.comes_back == comes_back
    assert VISIBLE not in got["base"] and got["base"]["KEPT"] == "1" and got["spares"] == ("node2",)
    assert got["towards"] == (None if interface else "10.0.0.1") and got["closed"]


def test_before_the_time_limit_a_stop_is_asked_for_once_and_signals_come_first(monkeypatch):
    clock = [1399.0]
    stand_in(monkeypatch, time=SimpleNamespace(time=lambda: clock[0]))
    by_signals = [None, TERMINATED, None, None]
    look = _also_by_clock(lambda: by_signals.pop(0), 2000.0, 600.0)
    assert look() is None
    clock[0] = 1401.0
    assert look() == TERMINATED
    assert look() == StopAsked("the time limit is 600 s away", comes_back=True)
    assert look() is None
    assert _also_by_clock(lambda: None, None, 600.0)() is None


def test_a_node_has_an_address_that_others_reach(monkeypatch):
    def found(address):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(socket.AF_INET, 0, 0, "", (address, 0))])
        return address_of("node1")

    assert found("10.0.0.1") == "10.0.0.1"
    for address in ("127.0.0.1", "127.0.1.1"):  # Debian's /etc/hosts has the second
        with pytest.raises(ConfigError, match=f"node1 is {address} here, which other nodes cannot reach"):
            found(address)
