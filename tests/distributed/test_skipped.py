"""A non-finite gradient is skipped on every rank, and too many in a row leave a dump that finds the micro-batch."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import replica_batch
from tests.tiny import hf_folder, run_config

from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.wire import Place, encode_part, write_parts
from dapo_megatron.checkpoint.integrity import intact_manifest
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.errors import DapoError, StorageError
from dapo_megatron.trainer.loop import train_step
from dapo_megatron.trainer.skipped import count_skipped, read_dump, sources


def poisoned_batch(config, layout, updates):
    """A step's batch of two updates; `updates` have a bad advantage in the last micro-batch of their last replica."""
    sequences = []

    def poison(batch):
        for update in updates:
            bad = batch.mini_batches[update].shards[-1][-1]
            bad[-1] = replace(bad[-1], advantage=np.nan)
            sequences.extend(sample.source for sample in bad)

    return replica_batch(config, 24, layout, 5, poison), sequences


def poisoned_step(config, skipped_before, updates=(1,)):
    actor = actor_on_rank(config)
    batch, sequences = poisoned_batch(config, actor.layout, updates)
    before = [p.detach().clone() for p in actor.modules[0].parameters()]
    losses = []
    update = actor.update

    def noted(*arguments):
        metrics = update(*arguments)
        losses.append([torch.equal(p, b) for p, b in zip(actor.modules[0].parameters(), before, strict=True)])
        before[:] = [p.detach().clone() for p in actor.modules[0].parameters()]
        return metrics

    actor.update = noted
    try:
        state, metrics = train_step(
            config,
            actor,
            SimpleNamespace(push=lambda version: {}),
            SimpleNamespace(verify=lambda version: {}),
            SimpleNamespace(phase=lambda name: nullcontext()),
            PolicyObjective(config.algorithm),
            TrainState(4, 4, skipped_before),
            batch,
        )
    except DapoError as e:
        return str(e), sequences
    return state, metrics["optimizer/skipped"], [all(same) for same in losses], any(losses[0])


def config_of(tmp_path, **actor):
    path = hf_folder(tmp_path / "hf", vocab=67)
    config = run_config(path, actor=actor, trainer={"max_skipped_updates": 1, "mini_batch_prompts": 2})
    return config.model_copy(update={"run_dir": str(tmp_path / "run")})


def test_one_skipped_update_is_counted_and_changes_nothing_on_any_rank(tmp_path):
    config = config_of(tmp_path, data_parallel_size=2)
    for state, skipped, unchanged, _ in run_ranks(2, poisoned_step, config, 0):
        assert (state.step, state.skipped, skipped) == (5, 1, 1.0)
        assert unchanged == [False, True]


def test_too_many_leave_a_dump_and_the_replay_finds_the_micro_batch(tmp_path):
    config = config_of(tmp_path, data_parallel_size=2)
    # The first update of the step is finite and ends a series: 1 before and 1 now are not 2 in a row.
    assert run_ranks(2, poisoned_step, config, 1)[0][0].skipped == 1
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_skipped_updates": 0})})
    (message, sequences), (other, _) = run_ranks(2, poisoned_step, config, 0)
    path = tmp_path / "run/dumps/step_000005"
    assert message == other and f"dapo-megatron replay {path}" in message and "\n" not in message
    dump, batch = read_dump(path)
    assert (dump.step, dump.in_a_row, [u.update for u in dump.updates]) == (5, 1, [1])
    assert dump.updates[0].micro_batches[-1][-1] == sequences and dump.updates[0].grad_norm == "nan"
    assert (batch.step, batch.version, len(batch.mini_batches)) == (5, 0, 2)
    samples = [s for mini in batch.mini_batches for shard in mini.shards for samples in shard for s in samples]
    assert len(samples) == len({s.source for s in samples}) == 16
    assert [s.source for s in samples if np.isnan(s.advantage)] == [sequences[-1]]
    assert intact_manifest(path / "weights").format == "weights"

    again = run_ranks(2, poisoned_step, config, 0)[0][0]
    assert f"dapo-megatron replay {path}_2" in again and read_dump(tmp_path / "run/dumps/step_000005_2")

    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dapo_megatron.cli", "replay", str(path), "actor.data_parallel_size=1"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    marked = [line for line in found.stdout.splitlines() if "!" in line]
    total = sum(len(shard) for shard in batch.mini_batches[1].shards)
    assert f"1 of {total} micro-batches have no finite gradient" in found.stdout
    assert len(marked) == 1 and sequences[0][0] in marked[0] and "nan" in marked[0]


def test_what_is_no_dump_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("{model: {path: x}, data: {train: x}}")
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dapo_megatron.cli", "replay", str(tmp_path)],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert found.returncode == 1 and "is no dump, no dumped batch and no run that holds batches" in found.stderr


def test_a_dump_tells_the_sequences_of_each_update_that_was_skipped(tmp_path):
    run_ranks(2, poisoned_step, config_of(tmp_path, data_parallel_size=2), 0, (0, 1))
    dump, batch = read_dump(tmp_path / "run/dumps/step_000005")
    assert (dump.in_a_row, [u.update for u in dump.updates]) == (2, [0, 1])
    for update, mini_batch in zip(dump.updates, batch.mini_batches, strict=True):
        assert update.micro_batches == [sources(shard) for shard in mini_batch.shards]


def test_a_dump_of_an_update_that_its_batch_has_not_is_refused(tmp_path):
    update = {"update": 1, "grad_norm": "inf", "loss": "1", "micro_batches": []}
    (tmp_path / "dump.json").write_text(json.dumps({"step": 1, "version": 0, "in_a_row": 1, "updates": [update]}))
    part = Place(step=1, version=0, update=0, updates=1, replica=0, replicas=1, part=0, parts=1)
    write_parts(tmp_path / "batch.msgpack", [encode_part(part, [])])
    with pytest.raises(StorageError, match=r"dump.json names update 1, batch.msgpack has 1: damaged"):
        read_dump(tmp_path)


def test_the_count_starts_anew_after_a_finite_update():
    def after(*skipped):
        count = 0
        for s in skipped:
            count = count_skipped(count, {"optimizer/skipped": s})
        return count

    assert (after(1.0, 1.0), after(1.0, 0.0), after(1.0, 0.0, 1.0), after()) == (2, 0, 1, 0)
