"""The srun of a step; and how steps start and end, with commands of SLURM that know no cluster."""

import os
import signal
import sys
import time

import msgspec
import psutil
import pytest

from dapo_megatron.config.launch import ContainerConfig
from dapo_megatron.run_folder import RunFolder
from launch.allocation import Allocation, Group, Node
from launch.commands import Command
from launch.processes import ProcessGroup
from launch.steps import Steps, step_command
from launch.task import Task

GROUPS = (Group(7, (Node("a", 4, 8), Node("b", 4, 8))), Group(8, (Node("c", 4, 8),)))


@pytest.mark.parametrize(
    ("groups", "hosts", "group", "nodes"),
    [
        (GROUPS[:1], ["a"] * 8 + ["b"] * 8, None, 2),
        (GROUPS, ["b", "a"], 0, 2),
        (GROUPS, ["c"], 1, 1),
    ],
)
def test_a_task_for_each_host_in_its_group_with_the_whole_environment(groups, hosts, group, nodes):
    argv = step_command(Allocation(7, 0, groups, True, None), "trainer", hosts, "x-%t.log", ["python", "-m", "x"])
    assert argv[0] == "srun" and argv[-3:] == ["python", "-m", "x"]
    assert f"--nodes={nodes}" in argv and f"--ntasks={len(hosts)}" in argv
    assert [a for a in argv if a.startswith("--het-group")] == ([] if group is None else [f"--het-group={group}"])
    # A script with --export=NONE would leave its steps without the snapshot's PYTHONPATH.
    assert "--export=ALL" in argv
    # The hosts' own order, ranks that do not outlive one of them, and a log that outlives its process.
    assert {"--distribution=arbitrary", "--kill-on-bad-exit=1", "--open-mode=append"} <= set(argv)


SLURM = {
    # A step's id is the pid of its srun; asked to end, it takes a moment.
    "srun": """echo "$$|${{1#--job-name=}}" >>{0}/running; trap "sleep 0.5; exit 3" TERM; sleep 60 & wait""",
    "squeue": "cat {0}/running",
    "scancel": 'kill -${{1#--signal=}} "${{@:2}}"',
    "scontrol": "exit 1",
}
BASE = {"HOME": "/home/me", "USER": "me"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script.format(tmp_path)}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "running").touch()
    return RunFolder(tmp_path)


@pytest.fixture
def only_own_children(monkeypatch):
    """A launcher ends whatever runs below it; below pytest, servers of other tests do."""
    others = {p.pid for p in psutil.Process().children(recursive=True)}

    class Launcher(psutil.Process):
        def children(self, recursive=False):
            return [p for p in super().children(recursive) if p.pid not in others]

    monkeypatch.setattr(psutil, "Process", Launcher)


@pytest.fixture
def steps(folder, request, only_own_children):
    """Of a job on four nodes."""
    allocation = Allocation(7, 0, (Group(7, tuple(Node(name, 4, 0) for name in "abcd")),), True, None)
    base, container = BASE | {"PATH": os.environ["PATH"]}, getattr(request, "param", None)
    with ProcessGroup(folder.path / "logs", grace_s=2.0) as group:
        made = Steps(group, folder, allocation, base, None, container)
        yield made
        made.close()


def started(steps, name, grace, environment=BASE, python=sys.executable):
    """A step that runs."""
    (child,) = steps.start(name, [Command(name, [python, "-m", "x"], {**environment}, None)], ["b"], grace=grace)
    return running(steps, child)


def running(steps, child):
    while f"{child.process.pid}|" not in (steps._folder.path / "running").read_text():
        time.sleep(0.02)
    return child


def test_who_has_a_grace_period_is_asked_to_end_and_whoever_is_not_meant_goes_on(steps):
    trainer, engine, other = (started(steps, name, name == "trainer") for name in ("trainer", "engine-0", "engine-1"))
    steps.end([trainer, engine])
    assert (trainer.process.returncode, engine.process.returncode) == (3, -signal.SIGKILL)
    assert other.process.poll() is None and steps._group.children == [other]


@pytest.mark.parametrize(
    ("steps", "python"),
    [(None, sys.executable), (ContainerConfig(runtime="pyxis", image="/i"), "python3")],
    indirect=["steps"],
)
def test_a_task_brings_what_its_node_has_not_and_the_containers_python(folder, steps, python):
    started(steps, "engine-0", False, BASE | {"HOME": "/scratch", "KEY": "1"})
    (task,) = msgspec.json.decode(folder.step("engine-0").read_bytes(), type=list[Task])
    assert task == Task([python, "-m", "x"], {"HOME": "/scratch", "KEY": "1"}, None, None)


def test_a_deputy_runs_on_another_node_and_never_again_where_one_has_died(folder, steps, monkeypatch):
    lost = ["b"]
    monkeypatch.setattr(steps._watch, "lost", lambda: [lost.pop()] if lost else [])
    for host in "cd":
        steps.lost_hosts(look=False)
        deputy = running(steps, steps._deputy)
        assert folder.step("deputy").with_suffix(".hosts").read_text() == f"{host}\n"
        steps.lost_hosts(look=False)
        assert steps._deputy is deputy  # it lives
        deputy.process.kill()
        deputy.process.wait()
    steps.lost_hosts(look=False)
    assert steps._deputy is None and steps._group.children == []
