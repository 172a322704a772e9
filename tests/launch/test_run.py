"""Whole jobs from the command line, every part real: they end well, die clearly, leave nothing behind, and resume."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from dapo_megatron.observe.metrics import read_metrics
from launch.demo import write_data, write_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROLES = {
    "engine": "sglang.launch_server",
    "controller": "dapo_megatron.rollout",
    "trainer rank": "dapo_megatron.trainer",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe for an untrained demo model: every group is wrong, so dynamic sampling is off."""
    folder = tmp_path_factory.mktemp("job")
    write_data(folder, random.Random(0))
    write_model(folder / "model")
    recipe = yaml.safe_load(open("launch/recipes/demo.yaml"))
    recipe["model"]["path"] = str(folder / "model")
    recipe["data"] |= {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "eval_limit": 4}
    recipe["algorithm"]["dynamic_sampling"] = False
    recipe["rollout"] |= {"prompts_per_step": 4, "group_size": 4}
    recipe["trainer"] |= {"mini_batch_prompts": 2, "checkpoint_every": 1, "steps": 2}
    recipe["optimizer"] = {"lr": 1e-3, "warmup_steps": 4}
    recipe["run_dir"] = str(folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path, folder / "run"


def start(recipe, *arguments):
    command = [sys.executable, "-m", "dapo_megatron.cli", "run", str(recipe), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=300):
    """(exit code, output, seconds until it ended); nothing it started may be left."""
    began = time.monotonic()
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output, time.monotonic() - began


def descendants(process, role):
    return [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if any(ROLES[role] in part for part in p.cmdline()) and "torch.distributed.run" not in p.cmdline()
    ]


def wait_for_steps(run_dir, count, process):
    while len(read_metrics(run_dir)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


def test_a_run_ends_dies_and_resumes(job):
    recipe, run_dir = job
    code, output, _ = finish(start(recipe))
    assert code == 0, output
    assert (run_dir / "report.html").stat().st_size > 100_000
    assert [r["step"] for r in read_metrics(run_dir)] == [0, 1, 2]

    code, output, _ = finish(start(recipe))
    assert code == 1 and "holds a run already" in output

    for role, steps in (("trainer rank", 4), ("controller", 6), ("engine", 8)):
        process = start(recipe, "--resume", "trainer.steps=1000")
        wait_for_steps(run_dir, steps, process)
        everything = psutil.Process(process.pid).children(recursive=True)
        os.kill(descendants(process, role)[0].pid, signal.SIGKILL)
        code, output, seconds = finish(process)
        assert code == 1 and seconds < 30, (role, seconds, output)
        assert role.split()[0] in output and ".log" in output
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in everything), role

    last = read_metrics(run_dir)[-1]["step"] + 2
    code, output, _ = finish(start(recipe, "--resume", f"trainer.steps={last}"))
    assert code == 0, output
    records = read_metrics(run_dir)
    assert [r["step"] for r in records] == list(range(last + 1))
    # 2 updates a step, 8 of warm-up: after step s the rate is lr * min(1, 2 s / 8), across every resume.
    assert [r["optimizer/lr"] for r in records[1:]] == pytest.approx([1e-3 * min(1, s / 4) for s in range(1, last + 1)])
    assert all(r["sync/logprob_difference"] <= 1e-4 for r in records[1:])


def test_terminate_leaves_nothing(job, tmp_path):
    process = start(job[0], f"run_dir={tmp_path / 'run'}", "trainer.steps=1000")
    wait_for_steps(tmp_path / "run", 1, process)
    everything = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    code, output, seconds = finish(process)
    assert code == 130 and "interrupted" in output and seconds < 30
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in everything)
