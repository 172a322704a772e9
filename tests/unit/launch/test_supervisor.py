"""In which order a supervisor tells what it sees, and what it starts and ends."""

import time
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dapo_megatron.engines.engine_set import read_engine_set
from dapo_megatron.keys import make_keys, write_keys
from dapo_megatron.process import Reporter
from dapo_megatron.run_folder import RunFolder
from launch import supervisor as under_test
from launch.job import Job
from launch.port_map import job_ports
from launch.processes import Child
from launch.states import End, GraceOver, HostLost, Limits, Phase, Progress, StopAsked, TrainingEnded
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


def test_a_spare_host_that_is_lost_takes_over_from_none(folder):
    watched = supervisor(folder, Hosts("node1", "node2"))
    assert list(watched._events(lambda: None))[:2] == [HostLost("node2"), HostLost("node1")]


def test_what_is_saved_counts_from_the_start_on(folder):
    (folder.checkpoints / "step_000040").mkdir(parents=True)
    watched = supervisor(folder, Hosts())
    assert (watched._state.saved, watched._state.saved_at_start) == (40, 40)
    (folder.checkpoints / "step_000045").mkdir()
    assert Progress(0, saved=45) in list(watched._events(lambda: None))


class Processes:
    """A backend whose processes run until the test, or the supervisor, ends them; and what they were started for."""

    def __init__(self, folder):
        self.folder, self.began, self.running, self.arguments = folder, [], {}, {}

    def start(self, name, commands, hosts, *, grace):
        children = []
        for command in commands:
            process = SimpleNamespace(returncode=None)
            process.poll = lambda process=process: process.returncode
            (log := self.folder.path / f"{command.name}.log").touch()
            children.append(Child(command.name, process, log, grace, (command.name,)))
            self.running[command.name], self.arguments[command.name] = process, command.arguments
        self.began.append(name)
        return children

    def end(self, children):
        for child in children:
            child.process.returncode = -9

    def lost_hosts(self, *, look):
        return []

    def kill(self, name):
        self.running[name].returncode = -9

    def finish(self, *names):
        """They end well, and say so."""
        for name in names:
            with Reporter(self.folder, name) as reporter:
                reporter.ended(None, "")
            self.running[name].returncode = 0


def play(folder, monkeypatch, *scenes, asked=lambda: None, **sections):
    """Run a supervisor of two engines, a controller and two ranks; a scene begins whenever it sleeps between two looks.

    Returns:
        (how it ended, what was started, in order)
    """
    config = run_config("nowhere", engine={"replicas": 2}, actor={"data_parallel_size": 2}, **sections)
    backend, scenes = Processes(folder), list(scenes)
    monkeypatch.setattr(under_test, "POLL_S", "a look")
    monkeypatch.setattr(under_test, "LAST_WORDS_S", "last words")
    monkeypatch.setattr(
        under_test.time, "sleep", lambda s: scenes.pop(0)(backend) if s == "a look" and scenes else time.monotonic()
    )

    def plan(hosts):
        nodes = [Node(host, host, 0, 4) for host in hosts]
        return place(config, nodes, nodes, job_ports(20000, 1))

    job = Job(folder.config, [])
    watched = Supervisor(config, folder, job, backend, plan, ("node1",), (), {}, limits=Limits(3))
    end = watched.run(asked)
    assert not scenes, "it ended too early"
    return end, backend.began


def starts(folder):
    found = read_engine_set(folder)
    return found.generation, [member.start for member in found.members]


def reach(folder, step):
    folder.metrics.write_text(f'{{"step": {step}, "time": 1.0}}\n')


def test_engines_are_started_again_alone_and_the_training_beside_them(folder, monkeypatch):
    seen = []

    def engine_dies(world):
        seen.append(starts(folder))
        world.kill("engine-1")

    def rank_dies(world):
        seen.append(starts(folder))
        assert "--weights" not in world.arguments["trainer-0"]
        folder.begun_with.write_text("what a restart begins with")
        world.kill("trainer-1")

    def one_is_done(world):
        assert starts(folder) == seen[-1]
        assert world.arguments["trainer-0"][-2:] == ["--weights", "what a restart begins with"]
        world.finish("controller", "trainer-0")

    scenes = [engine_dies, engine_dies, rank_dies, lambda world: None, one_is_done]
    end, began = play(folder, monkeypatch, *scenes, lambda world: world.finish("trainer-1"))
    assert end == End(None, "finished")
    assert began == ["engine-0", "engine-1", "controller", "trainer", "engine-1", "engine-1", "controller", "trainer"]
    assert seen == [(1, [1, 1]), (2, [1, 2]), (3, [1, 3])]


@pytest.mark.parametrize("mute", ["controller", "trainer-1"])
def test_one_that_never_gives_a_sign_of_life_hangs(folder, monkeypatch, mute):
    """As where SLURM does not make its step: an srun waits for ever."""
    clock = time.monotonic()
    monkeypatch.setattr(under_test.time, "monotonic", lambda: clock)
    monkeypatch.setattr(under_test.Heartbeats, "silent", lambda *_: [])  # all others are well
    monkeypatch.setattr(under_test.EngineWatch, "silent", lambda _: [])
    monkeypatch.setattr("launch.job.clear", lambda folder: None)  # and live on

    def later(seconds):
        nonlocal clock
        clock += seconds

    def done(world):
        world.finish("controller", "trainer-0", "trainer-1")

    scenes = [lambda _: later(590), lambda _: later(20), lambda _: None, lambda _: later(590), lambda _: None, done]
    with ExitStack() as others:
        for name in {"controller", "trainer-0", "trainer-1"} - {mute}:
            others.enter_context(Reporter(folder, name))
        end, began = play(folder, monkeypatch, *scenes)
    assert end == End(None, "finished")
    assert began == ["engine-0", "engine-1", "controller", "trainer", "controller", "trainer"]
    log = folder.journal.read_text()
    assert f" the {mute} hangs: no sign of life since it was started 610 s ago; see logs/latest/" in log


@pytest.mark.parametrize(("step", "kind"), [(8, "preempted"), (9, None)])
def test_who_is_asked_to_stop_at_the_last_step_has_finished(folder, monkeypatch, step, kind):
    def done(world):
        reach(folder, step)
        world.finish("controller", "trainer-0", "trainer-1")

    wishes = [StopAsked("SIGTERM", comes_back=False)]
    with Reporter(folder, "trainer-0") as reporter:
        reporter.phase("update")
        end, _ = play(folder, monkeypatch, done, asked=lambda: wishes.pop() if wishes else None, trainer={"steps": 9})
    assert end.kind == kind


def test_a_rank_that_ends_before_its_record_can_be_read_has_not_failed(folder, monkeypatch):
    """The record is written by another node; after the time for last words it is there."""

    def ends_without_a_record(world):
        world.running["trainer-1"].returncode = 0
        monkeypatch.setattr(under_test.time, "sleep", lambda _: world.finish("controller", "trainer-0", "trainer-1"))

    _, began = play(folder, monkeypatch, ends_without_a_record)
    assert began == ["engine-0", "engine-1", "controller", "trainer"]


def test_a_run_that_stops_does_not_look_after_its_engines(folder, monkeypatch):
    """SLURM would be asked at every look whether the host of a dead one is down, until the grace is over."""
    asked, looks = iter([StopAsked("SIGTERM", comes_back=False)]), []

    def engine_dies(world):
        world.lost_hosts = lambda look: looks.append(look) or []
        world.end = lambda children: pytest.fail(f"ended: {[child.name for child in children]}")
        world.kill("engine-1")

    def others_hang(world):
        hangs = [(member, "hangs") for member in read_engine_set(folder).members]
        monkeypatch.setattr(under_test.EngineWatch, "silent", lambda _: hangs)

    def done(world):
        world.end = lambda children: None
        world.finish("controller", "trainer-0", "trainer-1")

    monkeypatch.setattr(under_test, "LOOK_S", 0.0)
    with Reporter(folder, "trainer-0") as reporter:
        reporter.phase("update")
        scenes = [engine_dies, others_hang, lambda _: None, done]
        end, began = play(folder, monkeypatch, *scenes, asked=lambda: next(asked, None))
    assert end.kind == "preempted" and looks and not any(looks)
    assert began == ["engine-0", "engine-1", "controller", "trainer"]


@pytest.mark.parametrize("phase", ["start", "update"])
def test_a_stop_has_its_grace_once_there_is_something_to_save(folder, monkeypatch, phase):
    watched = supervisor(folder, Hosts())
    with Reporter(folder, "trainer-0") as reporter:
        reporter.phase(phase)
        now = time.monotonic()
        watched._ask_to_stop()
    monkeypatch.setattr(under_test.time, "monotonic", lambda: now + watched.config.launch.stop_grace_s - 1)
    assert folder.stop_request.exists() == (phase == "update")
    assert (GraceOver() in watched._events(lambda: None)) == (phase == "start")
    monkeypatch.setattr(under_test.time, "monotonic", lambda: now + watched.config.launch.stop_grace_s + 10)
    assert GraceOver() in watched._events(lambda: None)
