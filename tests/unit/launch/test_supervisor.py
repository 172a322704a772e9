"""In which order a supervisor tells what it sees, and what its log keeps of it."""

from dataclasses import replace

import pytest

from dapo_megatron.keys import make_keys, write_keys
from dapo_megatron.run_folder import RunFolder
from launch.job import Job
from launch.journal import Journal
from launch.port_map import job_ports
from launch.states import HostLost, Limits, Phase, Progress, StopAsked, TrainingEnded
from launch.supervisor import Supervisor
from launch.topology import Node, place
from tests.tiny import run_config


class Hosts:
    """A backend that has lost hosts, and on which nothing was started."""

    def __init__(self, *lost):
        self._lost = list(lost)

    def lost_hosts(self, *, look):
        lost, self._lost = self._lost, []
        return lost


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path)
    write_keys(folder, make_keys())
    return folder


def supervisor(folder, backend):
    """One of a run on node1, with a spare host."""
    config = run_config("nowhere")

    def plan(hosts):
        nodes = [Node(host, host, 0, 4) for host in hosts]
        return place(config, nodes, nodes, job_ports(20000, 1))

    job = Job(folder.config, [])
    return Supervisor(config, folder, job, backend, plan, ("node1",), ("node2",), {}, limits=Limits(0))


def test_a_host_is_known_to_be_lost_before_the_training_starts_again(folder):
    watched = supervisor(folder, Hosts("node1"))
    watched._state = replace(watched._state, phase=Phase.RESTARTING)
    assert list(watched._events(lambda: None))[:2] == [HostLost("node1"), TrainingEnded()]


def test_what_is_saved_counts_from_the_start_on(folder):
    (folder.checkpoints / "step_000040").mkdir(parents=True)
    watched = supervisor(folder, Hosts())
    assert (watched._state.saved, watched._state.saved_at_start) == (40, 40)
    (folder.checkpoints / "step_000045").mkdir()
    assert Progress(0, saved=45) in list(watched._events(lambda: None))


def test_what_leads_to_nothing_yet_is_in_the_log_too(folder):
    journal = Journal(folder)
    journal.decided(HostLost("node2"), [])
    journal.decided(StopAsked("SIGTERM: the job is cancelled or preempted", comes_back=False), [])
    journal.decided(TrainingEnded(), [])
    said = [line.partition(" ")[2] for line in folder.journal.read_text().splitlines()]
    assert said == ["node2 is lost", "SIGTERM: the job is cancelled or preempted"]
