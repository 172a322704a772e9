"""The actor against transformers, and against itself under other layouts."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.numpy import load_file

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.tiny import UNLIKE, groups, hf_folder, packed_batch, run_config

from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.errors import DapoError
from dapo_megatron.trainer.replica_batch import ReplicaBatch
from dapo_megatron.weights.exporter import export_stage

LAYOUTS = {
    "one": {},
    "tp2_sp": {"tensor_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
}
MODELS = [("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 32.0, "original_max_position_embeddings": 256}
# Sequences of 20 tokens see every band of the frequencies: kept, blended, divided.
ROPES = {
    "llama3": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3, other edges": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 16.0, "factor": 8.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all options": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
    },
}
CASES = (
    [(*model, {}) for model in MODELS]
    + [(kind, tied, UNLIKE) for kind, tied in [("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False)]]
    + [("qwen3_moe", False, UNLIKE), ("olmo2", False, {}), ("olmo2", True, UNLIKE)]
    + [("llama", True, UNLIKE | {"rope_parameters": rope}) for rope in ROPES.values()]
    + [("qwen3", False, {"rope_parameters": ROPES["yarn"]}), ("mistral", True, {"sliding_window": 512})]
    + [("qwen3", True, {"vocab_size": 65}), ("llama", False, UNLIKE | {"vocab_size": 67})]
)


BUILD = {"step": 1, "version": 0, "seed": 0, "mini_batch_groups": 2, "aggregation": "token"}


def step_batch(config, micro_batch_tokens):
    rules = dataclasses.replace(packing_rules(config), micro_batch_tokens=micro_batch_tokens)
    return packed_batch(groups(), rules=rules, **BUILD)


def replica_batch(config, micro_batch_tokens, layout, step=1, change=lambda batch: None):
    """What a rank is given of the same batch, which `change` may change before."""
    rules = dataclasses.replace(packing_rules(config), micro_batch_tokens=micro_batch_tokens)
    batch = build_step_batch(groups(), rules=rules, **BUILD)
    change(batch)
    updates = batch.mini_batches
    return ReplicaBatch(step, 0, len(updates), lambda update: updates[update].shards[layout.dp_rank], rules)


def one_step(config, micro_batch_tokens):
    """{(prompt, sample, position): log-prob} before the step, metrics of both updates, weights after them."""
    actor = actor_on_rank(config)
    batch = step_batch(config, micro_batch_tokens)
    scored, metrics = {}, []
    shards = [m.shards[actor.layout.dp_rank] for m in batch.mini_batches]
    old = [actor.logprobs(shard) for shard in shards]
    for shard, values in zip(shards, old, strict=True):
        for micro_batch, logprobs in zip(shard, values, strict=False):
            for position, value in zip(actor.own(micro_batch), logprobs.tolist(), strict=True):
                owner = np.searchsorted(micro_batch.cu_seqlens, position, side="right") - 1
                scored[(*micro_batch.sequences[owner], position - micro_batch.cu_seqlens[owner])] = value
    for shard, values in zip(shards, old, strict=True):
        metrics.append(actor.update(shard, PolicyObjective(config.algorithm), values))
    weights = {n: t.numpy().copy() for n, t in export_stage(actor.modules, actor.shape)}
    return scored, metrics, weights


def merged(results):
    scored, weights = {}, {}
    for s, _, w in results:
        scored |= s
        weights |= w
    return scored, results[0][1], weights


@pytest.mark.parametrize(("kind", "tied", "options"), CASES)
def test_logprobs_equal_transformers(tmp_path, kind, tied, options):
    path = hf_folder(tmp_path, kind, tied, **options)
    eager = {"experts_implementation": "eager"} if "moe" in kind else {}  # its grouped product has no float64
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **eager)
    for name in ("one", "tp2_sp", "pp2"):
        config = run_config(path, actor=LAYOUTS[name])
        scored, _, _ = merged(run_ranks(config.world_size, one_step, config, 40))
        for group in groups():
            for response in group.responses:
                ids = torch.tensor([group.prompt.input_ids + response.token_ids.tolist()])
                with torch.no_grad():
                    full = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                for position in range(len(group.prompt.input_ids) - 1, full.numel()):
                    got = scored.pop((group.prompt.id, response.sample, position))
                    assert got == pytest.approx(float(full[position]), abs=2e-5)
        assert not scored


def exported(config):
    """(weights, transfers) of an export that gathers every parameter alone, a few, or as many as there are."""
    actor, transfer, found = actor_on_rank(config), dist.batch_isend_irecv, []
    for most in (0, 40_000, 1 << 30):
        calls = []
        dist.batch_isend_irecv = lambda operations, calls=calls: calls.append(operations) or transfer(operations)
        weights = {n: t.numpy().copy() for n, t in export_stage(actor.modules, actor.shape, most)}
        found.append((weights, len(calls)))
    return found


@pytest.mark.parametrize(
    ("kind", "tied", "vocab", "name"),
    [
        ("llama", False, 64, "tp2"),
        ("mistral", False, 64, "pp2"),
        ("mistral", True, 64, "tp2"),
        ("qwen2", True, 64, "tp2_sp"),
        ("qwen3_moe", False, 64, "tp2_sp"),
        ("qwen3_moe", False, 64, "ep2"),
        ("olmo2", False, 64, "tp2_sp"),
        ("qwen3", True, 67, "tp2_sp"),
        ("llama", False, 67, "tp2"),
    ],
)
def test_the_weights_come_back_bit_for_bit(tmp_path, kind, tied, vocab, name):
    path = hf_folder(tmp_path, kind, tied, vocab=vocab, **UNLIKE)
    layout = (LAYOUTS | {"ep2": {"expert_model_parallel_size": 2, "data_parallel_size": 2}})[name]
    original, counts = load_file(path / "model.safetensors"), []
    for parts in zip(*run_ranks(2, exported, run_config(path, actor=layout)), strict=True):
        got = {n: t for weights, _ in parts for n, t in weights.items()}
        assert got.keys() == original.keys()
        for n, tensor in original.items():
            np.testing.assert_array_equal(got[n], tensor, err_msg=n)
        counts.append(parts[0][1])
    alone, few, most = counts
    if name in ("pp2", "ep2"):  # under ep2 the experts alone: two places, two parameters each
        assert counts == ([0, 0, 0] if name == "pp2" else [2 * 2 * 2, 2 * 2, 2])
    else:  # experts have a group of their own, and stand between what the others share
        assert alone > few > most == (5 if kind == "qwen3_moe" else 1)


@pytest.mark.parametrize(("kind", "tied", "vocab"), [("qwen2", True, 64), ("qwen3", False, 64), ("qwen3", True, 67)])
def test_every_layout_makes_the_same_update(tmp_path, kind, tied, vocab):
    path = hf_folder(tmp_path, kind, tied, vocab=vocab)
    reference = merged(run_ranks(1, one_step, run_config(path), 1000))
    for name, actor in list(LAYOUTS.items())[1:]:
        for budget in (24, 1000):
            _, metrics, weights = merged(run_ranks(2, one_step, run_config(path, actor=actor), budget))
            for got, expected in zip(metrics, reference[1], strict=True):
                for key in expected:
                    assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (name, budget, key)
            assert weights.keys() == reference[2].keys()
            for key, value in weights.items():
                np.testing.assert_allclose(value, reference[2][key], atol=2e-6, err_msg=f"{name} {budget} {key}")


def with_a_token_outside_the_vocabulary(config):
    actor = actor_on_rank(config)
    (mini_batch, _) = step_batch(config, 1000).mini_batches
    for token in (64, -1):
        mini_batch.shards[0][0].tokens[3] = token
        with pytest.raises(DapoError, match=f"token id {token} .* vocabulary has 64 entries"):
            actor.logprobs(mini_batch.shards[0])
    return True


@pytest.mark.parametrize("name", ["tp2_sp", "pp2"])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, name):
    config = run_config(hf_folder(tmp_path), actor=LAYOUTS[name])
    assert all(run_ranks(2, with_a_token_outside_the_vocabulary, config))


@pytest.mark.parametrize("name", ["tp2_sp", "pp2"])
def test_the_distance_to_the_engine(tmp_path, name):
    config = run_config(hf_folder(tmp_path), actor=LAYOUTS[name])
    scored, metrics, _ = merged(run_ranks(2, one_step, config, 24))
    apart = [
        abs(scored[group.prompt.id, response.sample, len(group.prompt.input_ids) - 1 + t] - logprob)
        for group in groups()
        for response in group.responses
        for t, logprob in enumerate(response.rollout_logprobs)
    ]
    assert sum(m["policy/tokens"] * m["mismatch/abs_mean"] for m in metrics) == pytest.approx(sum(apart), rel=1e-5)
    assert max(m["mismatch/abs_max"] for m in metrics) == pytest.approx(max(apart), rel=1e-5)
