"""Where a launcher's deputy runs, and what it may put back."""

import os
from types import SimpleNamespace

import pytest

from dapo_megatron.errors import DapoError
from dapo_megatron.run_folder import RunFolder
from launch.deputy import is_running, next_host, watch
from launch.requeue import failures

HOSTS = ["node1", "node2", "node3"]


def test_it_is_on_the_first_other_node_that_is_there():
    assert next_host(HOSTS, set()) == "node2"
    assert next_host(HOSTS, {"node2"}) == "node3"
    assert next_host(HOSTS, {"node2", "node3"}) is None
    assert next_host(HOSTS[:1], set()) is None


@pytest.mark.parametrize(
    ("shown", "restarts", "runs"),
    [
        ("JobId=7 JobName=dapo JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1", 0, True),
        ("JobId=7 JobName=dapo JobState=RUNNING Reason=None Requeue=1 Restarts=1 BatchFlag=1", 0, False),
        ("JobId=7 JobName=dapo JobState=RUNNING Reason=None Requeue=1 Restarts=10 BatchFlag=1", 1, False),
        ("JobId=7 JobName=dapo JobState=COMPLETED Reason=None Requeue=1 Restarts=0 BatchFlag=1", 0, False),
        ("JobId=7 JobName=dapo JobState=PENDING Reason=BeginTime Requeue=1 Restarts=1 BatchFlag=1", 1, False),
        ("", 0, False),
    ],
)
def test_only_its_own_attempt_is_put_back(shown, restarts, runs):
    assert is_running(shown, restarts) == runs


COMMANDS = """#!/bin/bash
case "$*" in
  *"show node"*) echo "NodeName=node1 State=DOWN* Port=6818" ;;
  *"show job"*) [ -e {folder}/back ] || echo "JobId=7 JobState=RUNNING Restarts=0" ;;
  requeue*) {requeue} ;;
esac
echo "$(basename $0) $*" >>{folder}/told
"""


def test_a_job_that_is_back_though_no_answer_came_is_not_cancelled(tmp_path, monkeypatch):
    RunFolder(tmp_path).snapshot(7).mkdir(parents=True)
    monkeypatch.setattr("launch.slurm_calls.PAUSE_S", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for command in ("scontrol", "scancel"):
        requeue = f"touch {tmp_path}/back; echo no answer >&2; exit 1"
        (tmp_path / command).write_text(COMMANDS.format(folder=tmp_path, requeue=requeue))
        (tmp_path / command).chmod(0o755)
    watch(RunFolder(tmp_path), 7, 0, "node1")
    assert "scancel" not in (tmp_path / "told").read_text()


@pytest.mark.parametrize("refuses", [False, True])
def test_a_job_without_a_launcher_goes_back_or_ends(tmp_path, monkeypatch, refuses):
    folder = RunFolder(tmp_path)
    folder.snapshot(7).mkdir(parents=True)
    monkeypatch.setattr("launch.slurm_calls.PAUSE_S", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for command in ("scontrol", "scancel"):
        requeue = "echo disabled >&2; exit 1" if refuses else ""
        (tmp_path / command).write_text(COMMANDS.format(folder=tmp_path, requeue=requeue))
        (tmp_path / command).chmod(0o755)
    if refuses:
        with pytest.raises(DapoError, match="`scontrol requeue 7` failed: disabled"):
            watch(folder, 7, 0, "node1")
        assert folder.journal.read_text().endswith("failed: disabled -> the job is cancelled\n")
    else:
        watch(folder, 7, 0, "node1")
    assert (tmp_path / "told").read_text().splitlines()[-1] == ("scancel 7" if refuses else "scontrol requeue 7")
    assert failures(folder, 7) == 1
    assert "node1" in folder.bad_nodes.read_text()


UP, DOWN = "NodeName=node1 State=MIXED", "NodeName=node1 State=DOWN*"
RUNS, OVER = "JobId=7 JobState=RUNNING Restarts=0", "JobId=7 JobState=RUNNING Restarts=1"
AWAY, FORGOTTEN = DapoError("slurmctld did not answer"), DapoError("`scontrol show job 7` failed: Invalid job id")


@pytest.mark.parametrize(
    ("node", "job", "does"),
    [
        *((UP, job, "watches") for job in (RUNS, AWAY)),
        *((AWAY, job, "watches") for job in (RUNS, AWAY)),
        *((DOWN, job, "requeues") for job in (RUNS, AWAY)),
        *((node, job, "ends") for node in (UP, DOWN, AWAY) for job in (OVER, FORGOTTEN)),
    ],
)
def test_it_watches_until_its_attempt_is_over_or_the_launchers_host_is_down(tmp_path, monkeypatch, node, job, does):
    def slurm(*command, tries=3):
        if command[1] == "requeue":
            raise InterruptedError("requeues")
        answer = node if "node" in command else job
        if isinstance(answer, DapoError):
            raise answer
        return answer

    def sleep(seconds):
        raise InterruptedError("watches")

    folder = RunFolder(tmp_path)
    folder.snapshot(7).mkdir(parents=True)
    monkeypatch.setattr("launch.deputy.slurm", slurm)
    monkeypatch.setattr("launch.deputy.time", SimpleNamespace(sleep=sleep))
    if does == "ends":
        watch(folder, 7, 0, "node1")
    else:
        with pytest.raises(InterruptedError, match=does):
            watch(folder, 7, 0, "node1")
