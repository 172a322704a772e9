"""Two AdamW updates by hand, in float64, from the gradients of the reference: every layout gives these weights.

The clip is active, and the numbers are such that each counts: the second update depends on both betas, epsilon is of
the size of the clipped gradients, weight decay leaves 1-D tensors (norms and biases) out, and the learning rate rises.

Mutations that were tried, each of which made it fail: no clip; the norms of dense layers and of experts clipped apart;
beta1, beta2 or epsilon not passed on; no weight decay (the schedule sets it), and one of norms and biases too; no
warm-up; a schedule that is stepped after the update, or twice.
"""

from functools import lru_cache

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed import reference
from tests.distributed.test_layouts import DP, EP, PP, TP, assert_close
from tests.tiny import groups, hf_folder, run_config

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.sample import weighted_samples
from dapo_megatron.weights.exporter import export_stage

LR, BETA1, BETA2, EPS, DECAY, CLIP = 0.01, 0.8, 0.9, 1e-3, 0.3, 0.05
WARM_UP_UPDATES = 4  # two rollout steps of two updates
LAYOUTS = {"one": {}, "TP2+SP": {TP: 2}, "DP2": {DP: 2}, "PP2": {PP: 2}, "EP2": {DP: 2, EP: 2}}
MODELS = {"dense": ("qwen2", True), "experts": ("qwen3_moe", False)}  # qwen2 has biases
CASES = [(layout, model) for layout in LAYOUTS for model in MODELS if layout != "EP2" or model == "experts"]


def batches():
    return [groups(2, 2, seed=1), groups(2, 2, seed=2)]


def gradients(folder, batch):
    """Of the first update of a step, where the old policy is the current one."""
    settings = dict(aggregation="token", temperature=1.0, eps_low=0.2, eps_high=0.28)

    def plain(old):
        return [
            [
                (
                    g.prompt.input_ids,
                    r.token_ids.tolist(),
                    r.loss_mask.tolist(),
                    old(gi, ri, len(r.token_ids)),
                    r.advantage,
                )
                for ri, r in enumerate(g.responses)
            ]
            for gi, g in enumerate(batch)
        ]

    scored = reference.update(folder, plain(lambda gi, ri, n: [0.0] * n), **settings)["logprobs"]
    found = reference.update(folder, plain(lambda gi, ri, n: [scored[gi, ri, t] for t in range(n)]), **settings)
    assert found["router_margin"] > 1e-5
    return found["gradients"]


@lru_cache
def by_hand(folder, work):
    """(weights before, weights after both updates, the gradients' norm in each of them)."""
    _, weights = reference.load(folder)
    weights = start = {name: w.detach() for name, w in weights.items()}
    (work / "config.json").write_text((folder / "config.json").read_text())
    mean, square, norms = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0), []
    for k, batch in enumerate(batches(), start=1):
        save_file(weights, work / "model.safetensors")
        found, lr, after = gradients(work, batch), LR * k / WARM_UP_UPDATES, {}
        norms.append(float(torch.cat([g.flatten() for g in found.values()]).norm()))
        for name, w in weights.items():
            g = found[name] * CLIP / norms[-1]
            mean[name] = BETA1 * mean[name] + (1 - BETA1) * g
            square[name] = BETA2 * square[name] + (1 - BETA2) * g**2
            step = mean[name] / (1 - BETA1**k) / ((square[name] / (1 - BETA2**k)).sqrt() + EPS)
            after[name] = w - lr * (step + (DECAY * w if w.dim() > 1 else 0))
        weights = after
    assert min(norms) > 2 * CLIP
    return start, weights, norms


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{model: (its folder, where the reference keeps the updated one)}"""
    return {
        name: (hf_folder(tmp_path_factory.mktemp(kind), kind, tied, seed=3), tmp_path_factory.mktemp("by_hand"))
        for name, (kind, tied) in MODELS.items()
    }


def two_updates(config):
    """[(learning rate, norm) of each], and from the senders the weights after both."""
    actor, told = actor_on_rank(config), []
    for batch in batches():
        shard = shard_samples(weighted_samples(batch, "token"), packing_rules(config))[actor.layout.dp_rank]
        metrics = actor.update(shard, PolicyObjective(config.algorithm), None)
        told.append((metrics["optimizer/lr"], metrics["optimizer/grad_norm"]))
    return told, {name: tensor.numpy().copy() for name, tensor in export_stage(actor.modules, actor.shape)}


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_two_updates_by_hand(folders, layout, model):
    folder, work = folders[model]
    start, want, norms = by_hand(folder, work)
    adam = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY, "clip_grad": CLIP}
    config = run_config(folder, actor=LAYOUTS[layout], optimizer=adam)
    assert config.warmup_updates == WARM_UP_UPDATES
    results = run_ranks(config.world_size, two_updates, config)
    for told, _ in results:
        assert [lr for lr, _ in told] == pytest.approx([LR / 4, LR / 2], rel=1e-12)
        assert [norm for _, norm in told] == pytest.approx(norms, rel=1e-5)
    moved = {n: torch.from_numpy(w).double() - start[n] for _, weights in results for n, w in weights.items()}
    assert_close(moved, {n: w - start[n] for n, w in want.items()}, 1e-3)
