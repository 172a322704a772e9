"""The same mini-batch gives the same loss, gradients and metrics under every layout, packing and aggregation.

Each case runs one update on real gloo ranks and is held against the float64 reference, and against one rank. A covering
array runs here (every pair of layout, model, packing and aggregation, and more); `make test-full` runs the product.

Mutations that were tried, each of which made it fail: the sign of the clip's lower edge, and of the objective; the
temperature left out; no all-reduce of the maxima; no reduce-scatter in the token loss's backward; a mean of each
micro-batch instead of the weights; the token count on every rank; no all-reduce of the metrics; hidden states scattered
over TP without a gather in backward; norms not summed over TP; zig-zag chunks in ascending order; sequences not padded
under CP; experts exported in another order; ETP 1 with EP 1; unequal numbers of micro-batches under EP; batch_p2p_comm
with VPP; q, k, v blocked instead of interleaved under TP; gradients of OLMo 2's sliced norms summed over TP.
"""

import itertools
import os
import random
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed import reference
from tests.tiny import UNLIKE, groups, hf_folder, response, run_config

from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.sample import weighted_samples
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.weights.exporter import export_stage

TP, PP, VPP, CP, EP, DP = (
    f"{name}_size"
    for name in (
        "tensor_model_parallel",
        "pipeline_model_parallel",
        "virtual_pipeline_model_parallel",
        "context_parallel",
        "expert_model_parallel",
        "data_parallel",
    )
)
NO_SP = {"sequence_parallel": False}
LAYOUTS = {
    "TP2": {TP: 2} | NO_SP,
    "TP2+SP": {TP: 2},
    "PP2": {PP: 2},
    "PP2, layers recomputed": {PP: 2, "recompute": True},
    "PP2+VPP2": {PP: 2, VPP: 2},
    "CP2": {CP: 2},
    "DP2": {DP: 2},
    "EP2": {DP: 2, EP: 2},
    "TP2xPP2+SP": {TP: 2, PP: 2},
    "TP2xCP2": {TP: 2, CP: 2} | NO_SP,
    "TP2xCP2+SP": {TP: 2, CP: 2},
    "DP2xTP2+SP": {DP: 2, TP: 2},
    "EP2xTP2+SP": {DP: 2, TP: 2, EP: 2},
    "EP2xCP2": {CP: 2, EP: 2},
}
if os.environ.get("LAYOUTS") == "all":
    LAYOUTS |= {
        "CP4": {CP: 4},
        "PP4": {PP: 4},
        "PP2xDP2": {PP: 2, DP: 2},
        "PP2xCP2": {PP: 2, CP: 2},
        "TP2xPP2+VPP2+SP": {TP: 2, PP: 2, VPP: 2},
        "TP2xCP2+SP, layers recomputed": {TP: 2, CP: 2, "recompute": True},
        "EP2xPP2": {DP: 2, EP: 2, PP: 2},
        "EP4": {DP: 4, EP: 4},
        "TP2xEP2+SP": {TP: 2, EP: 2},
    }
MODELS = {
    "qwen2": ("qwen2", True),
    "qwen3 tied": ("qwen3", True),
    "qwen3 untied": ("qwen3", False),
    "llama": ("llama", False),
    "olmo2": ("olmo2", False),
    "qwen3 moe": ("qwen3_moe", False),
    "qwen3 moe, weights that do not sum to 1": ("qwen3_moe_raw", True),
}
OPTIONS = {"llama": UNLIKE | {"vocab_size": 67}, "olmo2": UNLIKE, "qwen3 tied": {"vocab_size": 67}}
AGGREGATIONS = ("token", "group_token", "sample")
TEMPERATURE, EPS_LOW, EPS_HIGH = 0.9, 0.2, 0.28


def many():
    return groups(3, 3, seed=1), 1000


def one_a_micro_batch():
    return groups(2, 3, seed=2), 1


def unequal_lengths():
    batch = groups(2, 3, seed=6)
    long, short = batch[0].responses[0], batch[0].responses[1]
    batch[0].responses[:2] = [
        response(long.prompt_id, 0, long.token_ids.tolist() * 40, advantage=long.advantage),
        response(short.prompt_id, 1, short.token_ids.tolist()[:1], advantage=short.advantage),
    ]
    return batch, 40


def fully_masked_response():
    batch = groups(3, 2, seed=4)
    for masked in (batch[0].responses[1], *batch[2].responses):
        masked.loss_mask[:] = False
    batch[1].responses[0].loss_mask[0] = False
    return batch, 24


def empty_rank():
    batch = groups(1, 1, seed=5)
    batch[0].responses = [response(batch[0].prompt.id, 0, list(range(5, 15)), advantage=-0.7)]
    return batch, 1000


PACKINGS = {f.__name__: f for f in (many, one_a_micro_batch, unequal_lengths, fully_masked_response, empty_rank)}


def applies(layout, model):
    mixture, actor = "moe" in model, LAYOUTS[layout]
    return mixture or EP not in actor if actor.get("sequence_parallel", True) else not mixture


PRODUCT = [c for c in itertools.product(LAYOUTS, MODELS, PACKINGS, AGGREGATIONS) if applies(c[0], c[1])]


def covering(cases, extra):
    """Cases that together hold every pair of values, chosen greedily, and `extra` more."""
    shuffled = random.Random(0).sample(cases, len(cases))

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        best = max(shuffled, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen + [c for c in shuffled if c not in chosen][:extra]


CASES = PRODUCT if os.environ.get("LAYOUTS") == "all" else covering(PRODUCT, extra=10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, (kind, tied) in MODELS.items():
        made[name] = hf_folder(tmp_path_factory.mktemp(kind), kind, tied, layers=4, seed=3, **OPTIONS.get(name, {}))
    return made


@lru_cache
def expected(folder, packing, aggregation):
    """(groups with old log-probs whose ratios lie on both sides of the clip edges, the reference's update)."""
    batch, _ = PACKINGS[packing]()
    rng = random.Random(0)
    settings = dict(aggregation=aggregation, temperature=TEMPERATURE, eps_low=EPS_LOW, eps_high=EPS_HIGH)

    def plain():
        return [
            [
                (
                    g.prompt.input_ids,
                    r.token_ids.tolist(),
                    r.loss_mask.tolist(),
                    r.rollout_logprobs.tolist(),
                    r.advantage,
                )
                for r in g.responses
            ]
            for g in batch
        ]

    scored = reference.update(folder, plain(), **settings)["logprobs"]
    for gi, group in enumerate(batch):
        for ri, r in enumerate(group.responses):
            for t in range(len(r.token_ids)):
                apart = rng.choice([-0.5, -0.3, -0.1, 0.05, 0.15, 0.35, 0.6])
                r.rollout_logprobs[t] = scored[gi, ri, t] - apart
    truth = reference.update(folder, plain(), **settings)
    assert truth["clip_margin"] > 1e-3 and truth["router_margin"] > 1e-5 and truth["scale"] > 0.1
    return batch, truth


def config_for(folder, layout, packing, aggregation):
    return run_config(
        folder,
        actor=LAYOUTS.get(layout, {}) | {"micro_batch_tokens": PACKINGS[packing]()[1], "loss_chunk_tokens": 6},
        algorithm={"aggregation": aggregation, "clip_low": EPS_LOW, "clip_high": EPS_HIGH},
        rollout={"temperature": TEMPERATURE},
        optimizer={"clip_grad": 1e9},
    )


def actor_and_shard(config, batch):
    """This rank's actor and its micro-batches of one mini-batch."""
    actor = actor_on_rank(config)
    samples = weighted_samples(batch, config.algorithm.aggregation)
    return actor, shard_samples(samples, packing_rules(config))[actor.layout.dp_rank]


def one_update(config, batch):
    """Metrics of one update and, from the senders, its gradients by Hugging Face name."""
    actor, shard = actor_and_shard(config, batch)
    old = [actor.own_column(m, m.rollout_logprobs) for m in shard]
    return actor.update(shard, PolicyObjective(config.algorithm), old), gradients(actor)


def gradients(actor):
    """{Hugging Face name: gradient of the last update} on the senders; overwrites the weights."""
    for chunk in actor.model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            for bucket in buffer.buckets:  # each data-parallel rank ends with its own part of the sum
                group = buffer.data_parallel_group
                part = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, part, group=group)
    with torch.no_grad():
        for module in actor.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.main_grad)
    return {name: tensor.numpy().copy() for name, tensor in export_stage(actor.modules, actor.shape)}


def run(config, batch):
    results = run_ranks(config.world_size, one_update, config, batch)
    return results[0][0], {name: torch.from_numpy(array) for _, found in results for name, array in found.items()}


@lru_cache
def on_one_rank(folder, packing, aggregation):
    return run(config_for(folder, "one", packing, aggregation), expected(folder, packing, aggregation)[0])


def assert_close(got, want, relative):
    assert got.keys() == want.keys()
    whole = torch.cat([t.double().flatten() for t in want.values()]).norm()
    for name, tensor in want.items():
        difference = (got[name].double() - tensor.double()).norm()
        assert difference <= max(relative * tensor.double().norm(), 1e-6 * whole), (name, difference, tensor.norm())


@pytest.mark.parametrize(("layout", "model", "packing", "aggregation"), CASES)
def test_the_update_is_the_same(folders, layout, model, packing, aggregation):
    batch, truth = expected(folders[model], packing, aggregation)
    metrics, found = run(config_for(folders[model], layout, packing, aggregation), batch)

    assert abs(metrics["policy/loss"] - truth["loss"]) <= 2e-6 * max(truth["scale"], 1e-3)
    assert metrics["policy/tokens"] == truth["tokens"]
    means = truth["means"]
    assert metrics["policy/entropy"] == pytest.approx(means["entropy"], rel=1e-5)
    assert metrics["policy/ratio_mean"] == pytest.approx(means["ratio"], rel=1e-5)
    assert metrics["policy/clip_high_share"] == pytest.approx(means["high"], rel=1e-9)
    assert metrics["policy/clip_low_share"] == pytest.approx(means["low"], rel=1e-9)
    whole = torch.cat([t.flatten() for t in truth["gradients"].values()]).norm()
    assert metrics["optimizer/grad_norm"] == pytest.approx(float(whole), rel=1e-4)
    assert_close(found, truth["gradients"], 1e-4)

    alone, alone_gradients = on_one_rank(folders[model], packing, aggregation)
    assert_close(found, alone_gradients, 1e-5)
    for name in alone:
        assert metrics[name] == pytest.approx(alone[name], rel=1e-5, abs=2e-6), name


def ratios_of_the_first_update(config, batch):
    """The update's own log-probs minus the old ones, of this rank's labels, in the first mini-batch of a step."""
    actor, shard = actor_and_shard(config, batch)
    metrics = actor.update(shard, PolicyObjective(config.algorithm), actor.logprobs(shard))
    return metrics["policy/ratio_mean"], metrics["policy/approx_kl"]


@pytest.mark.parametrize("layout", ["one", "TP2+SP", "PP2+VPP2", "TP2xCP2+SP", "DP2"])
def test_the_first_ratio_is_exactly_one(folders, layout):
    folder = folders["qwen3 tied"]
    config = config_for(folder, layout, "unequal_lengths", "token")
    results = run_ranks(config.world_size, ratios_of_the_first_update, config, unequal_lengths()[0])
    # k3 = exp(d) - 1 - d is zero only where d is; it is a mean of values that are never negative.
    assert all(result == (1.0, 0.0) for result in results)
