"""What is no batch of a run, or does not fit the model, is one line before anything is trained."""

import json
import re
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


TWO_STAGES = ("actor.pipeline_model_parallel_size=2", "actor.virtual_pipeline_model_parallel_size=2")


@pytest.mark.slow
def test_a_replay_tells_the_same_in_every_layout(tmp_path):
    """Three micro-batches, which two interleaved stages cannot take as they are; nor one alone."""
    path, dump = hf_folder(tmp_path / "hf", layers=4), tmp_path / "run" / "dumps" / "step_000001"
    config, folder = run_config(path, actor={"micro_batch_tokens": 40}), RunFolder(tmp_path / "run")
    batch = build_step_batch(groups(4, vocab=60), rules=packing_rules(config), **OPTIONS)
    assert [len(shard) for mini in batch.mini_batches for shard in mini.shards] == [3, 3]
    write_parts(folder.batch(1), ServedBatch(batch).all_encoded())
    there(path, dump / "weights")
    write_parts(dump / "batch.msgpack", ServedBatch(batch).all_encoded())
    update = {"update": 0, "grad_norm": "nan", "loss": "nan", "micro_batches": []}
    (dump / "dump.json").write_text(json.dumps({"step": 1, "version": 0, "in_a_row": 1, "updates": [update]}))
    for place in (folder.path, dump):
        (place / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    for target, layouts in ((folder.path, (TWO_STAGES,)), (dump, (TWO_STAGES, ("actor.data_parallel_size=2",)))):
        expected = numbers(replay(target))
        assert len(expected) >= 2
        for layout in layouts:
            assert numbers(replay(target, *layout)) == pytest.approx(expected, rel=2e-3), (target, layout)


def numbers(replayed):
    """Losses and gradient norms that a replay has told."""
    code, out, err = replayed
    assert code == 0, err
    return [float(number) for number in re.findall(r"(?:loss|norm|│) (-?\d+\.\d+)", out)]
