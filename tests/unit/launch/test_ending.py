"""Why SLURM ends a job, and what a SIGTERM asks for."""

import os
import time

import pytest

from launch import ending as module, slurm
from launch.ending import ending, read_ending
from launch.slurm import TERMINATED, _explained
from launch.states import GraceOver, StopAsked
from tests.unit.launch.test_allocation import recorded

LIMIT, CANCELLED = "time limit", "cancelled or preempted"


@pytest.mark.parametrize("name", ["plain", "het_requeued"])
@pytest.mark.parametrize(
    ("state", "reason", "why"),
    [
        ("RUNNING", "None", None),
        ("COMPLETING", "TimeLimit", LIMIT),
        ("TIMEOUT", "TimeLimit", LIMIT),
        ("COMPLETING", "None", CANCELLED),
        ("CANCELLED", "None", CANCELLED),
        ("PREEMPTED", "None", CANCELLED),
        ("PENDING", "BeginTime", CANCELLED),
    ],
)
def test_why_a_job_ends(name, state, reason, why):
    shown = recorded(name)[1].replace("JobState=RUNNING Reason=None", f"JobState={state} Reason={reason}", 1)
    assert read_ending(shown) == why
    assert read_ending(shown.replace(f"JobName={name}", "JobName=x JobState=COMPLETING Reason=TimeLimit")) == why


@pytest.mark.parametrize("does", ["exec sleep 20", "exit 1"])
def test_where_slurm_does_not_answer_nobody_knows(does, monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{does}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "ANSWER_S", 0.5)
    began = time.monotonic()
    assert ending(7) is None and read_ending("") is None
    assert time.monotonic() - began < 10  # KillWait may be 30


@pytest.mark.parametrize("why", [LIMIT, CANCELLED, None])
def test_a_sigterm_of_the_time_limit_wants_the_job_back(why, monkeypatch):
    monkeypatch.setattr(slurm, "ending", lambda job: why if job == 7 else "")
    near = StopAsked("SIGUSR1: the time limit is near", comes_back=True)
    waiting = [near, TERMINATED, None, GraceOver()]
    asked = _explained(lambda: waiting.pop(0), 7)
    assert asked() is near
    assert asked() == (StopAsked("SIGTERM: the time limit is reached", True) if why == LIMIT else TERMINATED)
    assert asked() is None and asked() == GraceOver()
