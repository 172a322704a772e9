"""A job's own copy of the code: what Python finds with its environment, wherever it is started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_megatron.config import load_config
from dapo_megatron.errors import ConfigError
from launch import job_snapshot
from launch.job_snapshot import (
    NOTE,
    PACKAGES,
    environment_in,
    is_in,
    remember,
    remembered,
    take_snapshot,
    user_code,
)
from tests.tiny import run_config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_the_snapshot_is_found_before_the_working_folder_and_what_is_installed(tmp_path, before):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    base = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": before} if before else {})
    ask = "import dapo_megatron as d, tests.launch.conftest, launch.topology as t; print(d.__path__[0], t.__file__)"
    environment = environment_in(tmp_path, base, ROOT)
    found = subprocess.run([sys.executable, "-c", ask], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == [f"{tmp_path}/code/dapo_megatron", f"{tmp_path}/code/launch/topology.py"], found
    assert (before in environment["PYTHONPATH"].split(":")) if before else environment["PYTHONPATH"].count(":") == 1
    assert not is_in(tmp_path)


def test_a_snapshot_is_of_the_first_start_and_whole(tmp_path, monkeypatch):
    def slurm(*command):
        assert command[:4] == ("scontrol", "write", "batch_script", "7")
        Path(command[4]).write_text("exec python")

    monkeypatch.setattr(job_snapshot, "slurm", slurm)
    snapshot, config = tmp_path / "snapshots" / "job_7", run_config("nowhere")
    left = snapshot.with_name(".job_7.partial") / "code" / "launch"
    left.mkdir(parents=True)
    (left / "of_an_earlier_try.py").touch()
    take_snapshot(config, snapshot, 7)
    assert load_config(snapshot / "config.yaml") == config and (snapshot / "script.sh").read_text() == "exec python"
    names = {path.relative_to(snapshot / "code") for path in snapshot.rglob("*.py")}
    assert names == {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not list(snapshot.rglob("__pycache__")) and [p.name for p in snapshot.parent.iterdir()] == ["job_7"]
    take_snapshot(config.model_copy(update={"seed": 3}), snapshot, 7)
    assert load_config(snapshot / "config.yaml") == config


def test_a_jobs_comment_names_its_snapshot_behind_what_its_user_wrote(tmp_path, monkeypatch):
    comment = "mine: do not cancel"

    def slurm(*command):
        nonlocal comment
        if command[1] == "update":
            assert command[2] == "JobId=7"
            comment = command[3].removeprefix("Comment=")
        return f"JobId=7 JobName=dapo\n   Power=\n   Comment={comment}\n   StdErr=/x/err\n"

    monkeypatch.setattr(job_snapshot, "slurm", slurm)
    assert remembered(7) is None
    snapshot = tmp_path / "of a job"
    for path in (tmp_path, snapshot):
        remember(path, 7)
    assert comment == f"mine: do not cancel {NOTE} {snapshot}"
    with pytest.raises(ConfigError, match=f"{snapshot}, which job 7 began with, is gone"):
        remembered(7)
    snapshot.mkdir()
    assert remembered(7) == snapshot


def test_of_a_users_code_what_the_config_names_is_copied(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rollout.py").write_text("")
    (tmp_path / "my_graders").mkdir()
    (tmp_path / "my_graders" / "__init__.py").write_text("raise RuntimeError('it is imported')")

    def named(function, grader=None):
        return user_code(run_config(tmp_path, rollout={"function": function}, grading={"grader": grader}))

    assert named("my_rollout:f", "my_graders.strict:g") == [tmp_path / "my_graders", tmp_path / "my_rollout.py"]
    assert named("my_rollout:f") == [tmp_path / "my_rollout.py"]
    installed = ["dapo_megatron.rollout.single_turn:rollout", "numpy.linalg:norm", "json:loads", "sys:exit"]
    for name in [*installed, "not_there:f", ":f", ""]:
        assert named(name) == []
