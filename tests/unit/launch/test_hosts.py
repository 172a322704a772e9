"""Which hosts are gone: by SLURM's word, or because their slurmd has not answered several times in a row."""

import time

import pytest

from dapo_megatron.errors import DapoError
from launch import hosts as module
from launch.hosts import MISSES, HostWatch, NodeState, nodes_of, slurmd_port

SHOWN = """\
NodeName=node1 Arch=x86_64 CPUAlloc=4 NodeAddr=node1 NodeHostName=node1 Port=17001 State=MIXED+PLANNED Weight=1
NodeName=node2 NodeAddr=node2 State=DOWN*+NOT_RESPONDING ThreadsPerCore=1 Reason=State=IDLE
NodeName=node3 State=IDLE+POWERING_DOWN
NodeName=node4 State=DOWN+DRAIN
"""


def test_what_slurm_says_of_nodes():
    assert nodes_of(SHOWN) == {
        "node1": NodeState(False, 17001),
        "node2": NodeState(True, None),
        "node3": NodeState(False, None),
        "node4": NodeState(True, None),
    }
    assert nodes_of("") == {}


@pytest.mark.parametrize(("shown", "port"), [("6818", 6818), ("6818-6825", None), ("", None)])
def test_the_port_of_slurmd_where_there_is_one_for_all(shown, port):
    assert slurmd_port(f"SlurmctldPort           = 6817\nSlurmdPort              = {shown}\nSlurmdDebug = 3\n") == port


class World:
    """`down` and `silent` are hosts; `at` is the ports at which each was looked for."""

    def __init__(self, monkeypatch):
        self.down, self.silent, self.at, self.looks = set(), set(), [], 0
        monkeypatch.setattr(module, "slurm", self.slurm)
        monkeypatch.setattr(module, "reaches", self.reaches)
        monkeypatch.setattr(module, "LOOK_S", 0.01)

    def slurm(self, *command, tries):
        if command[-1] == "config":
            return "SlurmdPort = 6818\n"
        self.looks += 1
        if self.down == "slurmctld is away":
            raise DapoError("it did not answer")
        names = command[-1].split(",")
        ports = {"node2": " Port=17002"}
        return "".join(f"NodeName={n}{ports.get(n, '')} State={'DOWN' if n in self.down else 'IDLE'}\n" for n in names)

    def reaches(self, host, port):
        self.at.append((host, port))
        return host not in self.silent

    def wait(self, looks):
        end = self.looks + looks
        while self.looks < end:
            time.sleep(0.005)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


@pytest.fixture
def watch(world):
    watch = HostWatch(["node1", "node2", "node3"])
    yield watch
    watch.close()


def test_who_is_down_is_told_once_and_is_looked_for_no_longer(world, watch):
    world.down = {"node3"}
    watch.look_for_down()
    assert watch.lost() == ["node3"]
    world.wait(2)
    world.at.clear()
    world.wait(2 * MISSES)
    assert watch.lost() == [] and set(world.at) == {("node1", 6818), ("node2", 17002)}


def test_who_does_not_answer_several_times_in_a_row_is_lost_also_while_slurmctld_is_away(world, watch):
    world.wait(1)
    world.silent, world.down = {"node3"}, "slurmctld is away"
    world.wait(MISSES + 3)
    assert watch.lost() == ["node3"]


def test_one_answer_between_is_enough(world, monkeypatch):
    answers = iter(([False] * (MISSES - 1) + [True]) * 4)
    monkeypatch.setattr(module, "reaches", lambda host, port: host != "node2" or next(answers, True))
    watch = HostWatch(["node1", "node2"])
    world.wait(4 * MISSES + 2)
    watch.close()
    assert watch.lost() == []


def test_where_the_launchers_own_host_does_not_answer_nothing_is_concluded(world, watch):
    world.silent = {"node1", "node2", "node3"}
    world.wait(3 * MISSES)
    assert watch.lost() == []


def test_hosts_that_do_not_answer_are_asked_side_by_side(world, monkeypatch):
    """A switch with half of the nodes behind it is gone: one after the other they would take 20 s to ask."""
    names = [f"node{i}" for i in range(20)]
    world.silent = set(names[10:])

    def reaches(host, port):
        if host in world.silent:
            time.sleep(0.5)
        return host not in world.silent

    monkeypatch.setattr(module, "reaches", reaches)
    watch, lost, end = HostWatch(names), [], time.monotonic() + 10
    while len(lost) < 10 and time.monotonic() < end:
        time.sleep(0.05)
        lost += watch.lost()
    watch.close()
    assert sorted(lost) == names[10:]
