"""A job's own copy of the code: what Python finds with its environment, wherever it is started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job_snapshot import PACKAGES, environment_in, is_in, user_code
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
