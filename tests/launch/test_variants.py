"""Whole jobs that leave the beaten track: ahead of the trainer, two engines, a user's rollout, parquet, experts."""

import json
import os

import msgspec
import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.batching.wire import read_step_batch
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.rollout.ledger import check_exactly_once, read_ledger
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import finish, recipe, start
from tests.tiny import hf_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("in_flight", ["retract", "keep_kv"] if os.environ.get("LAYOUTS") == "all" else ["keep_kv"])
def test_ahead_of_the_trainer_on_two_engines_with_a_rollout_of_ones_own(tmp_path, in_flight):
    path = recipe(
        tmp_path,
        resharding={"in_flight": in_flight},
        rollout={"max_policy_lag": 1, "function": "tests.launch.two_turns:rollout"},
        engine={"replicas": 2},
        trainer={"steps": 4},
        checkpoint={"every": 4},
        observe={"dump_batches": True},
    )
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    table = pyarrow.Table.from_pylist([{"question": r["prompt"], "truth": {"value": r["answer"]}} for r in rows[:40]])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    fields = ["data.prompt_field=question", "data.answer_field=truth.value", "data.eval=null"]

    code, output, _ = finish(start(path, f"data.train={tmp_path / 'train.parquet'}", *fields))
    assert code == 0, output
    records = read_metrics(RunFolder(tmp_path / "run"))[1:]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    # Groups are generated all the time: their tokens are one version behind, and never more.
    assert records[0]["rollout/lag_max"] == 0 and max(r["rollout/lag_max"] for r in records) == 1
    assert all(r["sync/logprob_difference"] <= 1e-4 for r in records)
    assert all(r["mismatch/abs_mean"] < 0.5 for r in records)
    assert all(0 <= r["rollout/kept_cache_share"] <= (in_flight == "keep_kv") for r in records)
    assert all(r["sync/checksums"] > 10 for r in records)

    batch = read_step_batch(tmp_path / "run" / "batches" / "step_000002.msgpack")
    samples = [s for mini in batch.mini_batches for shard in mini.shards for samples in shard for s in samples]
    trained = sum(int(s.loss_mask.sum()) for s in samples)
    # Each response holds three tokens that the model did not write.
    responses = len(samples)
    assert trained <= responses * 8 and responses == 16
    ledger = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [e.step for e in ledger if e.fate == "kept"] == [s for s in range(1, 5) for _ in range(4)]
    assert check_exactly_once(ledger, 40).problems == []


def test_a_mixture_of_experts_spread_over_ranks(tmp_path):
    path = recipe(
        tmp_path,
        actor={"tensor_model_parallel_size": 1, "data_parallel_size": 2, "expert_model_parallel_size": 2},
        trainer={"steps": 2},
        checkpoint={"every": 2},
    )
    # The tokenizer of the demo with a Qwen3-MoE that has its vocabulary.
    hf_folder(tmp_path / "moe", "qwen3_moe", tied=False, vocab=16)
    for file in (tmp_path / "model").glob("token*"):
        (tmp_path / "moe" / file.name).write_bytes(file.read_bytes())
    arguments = [f"model.path={tmp_path / 'moe'}", "data.eval=null"]
    code, output, _ = finish(start(path, *arguments))
    assert code == 0, output
    records = read_metrics(RunFolder(tmp_path / "run"))[1:]
    assert [r["step"] for r in records] == [1, 2]
    assert all(r["sync/logprob_difference"] <= 1e-4 for r in records)
    assert all(r["optimizer/grad_norm_min"] > 0 for r in records)
    manifest = msgspec.json.decode((tmp_path / "run/checkpoints/step_000002/manifest.json").read_bytes())
    assert manifest["layout"]["ep"] == 2 and manifest["updates"] == 4
