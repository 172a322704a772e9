"""Which hosts of a job are taken for lost."""

import time

import pytest

from dapo_megatron.errors import DapoError
from launch import hosts
from launch.hosts import HostWatch, NodeState, nodes_of, slurmd_port

STATES = {
    "IDLE": False,
    "ALLOCATED": False,
    "MIXED+DRAIN": False,
    "IDLE+CLOUD+POWERED_DOWN": False,
    "DOWN": True,
    "DOWN*": True,
    "DOWN*+CLOUD": True,
    "DOWN+DRAIN": True,
}


@pytest.mark.parametrize("state", STATES)
def test_the_state_of_a_node(state):
    line = f"NodeName=node1 Arch=x86_64 CPUAlloc=4 NodeAddr=node1 Port=6819 State={state} ThreadsPerCore=1 Comment=DOWN"
    assert nodes_of(line) == {"node1": NodeState(STATES[state], 6819)}
    assert nodes_of(line.replace("Port=6819 ", "")) == {"node1": NodeState(STATES[state], None)}


def test_the_port_of_slurmd():
    assert slurmd_port("SlurmctldPort           = 6817\nSlurmdPort              = 6818\n") == 6818
    assert slurmd_port("SlurmdPort              = 6900-6910\n") is None and slurmd_port("") is None


def watched(monkeypatch, silent, down=(), seconds=1.0, count=20):
    """What a watch of node0, node1, ... has told after a while in which those do not answer, or are down."""
    names = [f"node{i}" for i in range(count)]

    def answer(*command, **_):
        if command[2] == "config":
            return "SlurmdPort = 6818\n"
        if down is None:
            raise DapoError("slurmctld is away")
        return "".join(f"NodeName={n} State={'DOWN' if n in down else 'IDLE'}\n" for n in command[-1].split(","))

    def reaches(host, port):
        assert port == 6818
        if host in silent:
            time.sleep(hosts.CONNECT_S)
        return host not in silent

    for name, value in {"slurm": answer, "reaches": reaches, "LOOK_S": 0.02, "CONNECT_S": 0.05}.items():
        monkeypatch.setattr(hosts, name, value)
    watch = HostWatch(names)
    time.sleep(seconds)
    watch.close()
    return sorted(watch.lost())


def test_hosts_that_do_not_answer_are_lost_together(monkeypatch):
    """A switch with half of the nodes behind it is gone: each takes a while to ask, and all are told in time."""
    gone = [f"node{i}" for i in range(10, 20)]
    assert watched(monkeypatch, gone) == gone
    assert watched(monkeypatch, gone, down=None) == gone


def test_hosts_that_slurm_calls_down_are_lost(monkeypatch):
    assert watched(monkeypatch, [], ["node3"]) == ["node3"]


def test_where_the_launchers_own_host_does_not_answer_nothing_is_concluded(monkeypatch):
    assert watched(monkeypatch, ["node0", "node1"]) == []
