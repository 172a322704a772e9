"""What is no batch of a run, or does not fit the model, is one line before anything is trained."""

import subprocess
import sys

import pytest
import yaml

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.wire import write_parts
from dapo_megatron.rollout.served import ServedBatch
from dapo_megatron.run_folder import RunFolder
from tests.tiny import groups, hf_folder, run_config
from tests.unit.checkpoint.conversions import there

OPTIONS = {"step": 1, "version": 0, "seed": 0, "mini_batch_groups": 2, "aggregation": "token"}


@pytest.fixture
def run(tmp_path):
    """A run folder with one dumped batch."""
    config = run_config(hf_folder(tmp_path / "hf", layers=1))
    folder = RunFolder(tmp_path / "run")
    batch = build_step_batch(groups(4, vocab=60), rules=packing_rules(config), **OPTIONS)
    write_parts(folder.batch(1), ServedBatch(batch).all_encoded())
    folder.config.write_text(yaml.safe_dump(config.model_dump()))
    return folder


def replay(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "dapo_megatron.cli", "replay", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    return done.returncode, done.stdout, done.stderr


def test_a_replay_that_cannot_be_is_one_line(run, tmp_path):
    code, out, err = replay(run.path, "actor.tensor_model_parallel_size=3")
    assert (code, err.count("\n")) == (1, 1) and "does not divide the model's number of attention heads 4" in err
    code, out, err = replay(run.path, "--begin", tmp_path / "hf")
    assert (code, err.count("\n")) == (1, 1) and f"the replay failed: {tmp_path}/hf/manifest.json cannot be read" in err
    small = hf_folder(tmp_path / "small", layers=1, vocab=32)
    code, out, err = replay(run.path, f"model.path={small}")
    assert (code, err.count("\n")) == (1, 1) and "the model has 32: give the run's own" in err

    run.batch(1).rename(run.batch(2))
    there(tmp_path / "hf", tmp_path / "weights")
    code, out, err = replay(run.path, "--begin", tmp_path / "weights")
    assert (code, err.count("\n")) == (1, 1) and "step_000002.msgpack holds the batch step_000001.msgpack" in err
