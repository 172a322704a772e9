"""How far the trainer's log-probs are from those the engine sampled with: metrics of every step."""

import torch
import torch.distributed as dist

from dapo_megatron.actor.actor import Actor
from dapo_megatron.algorithm.importance import mismatch_statistics
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.config import RunConfig

DEFAULT_CAP = 2.0
"""C that the share of truncated tokens is reported for while truncated importance sampling is off."""


def engine_mismatch(
    config: RunConfig, actor: Actor, shards: list[list[MicroBatch]], old: list[list[torch.Tensor] | None]
) -> dict[str, float]:
    """mismatch/* over the step's trained tokens, equal on all ranks; empty where no log-probs were recomputed."""
    if config.algorithm.old_logprobs == "rollout" or any(o is None for o in old):
        return {}
    cap = config.algorithm.importance_cap or DEFAULT_CAP
    sums = torch.zeros(4, dtype=torch.float64, device=actor.device)
    peak = torch.zeros(1, dtype=torch.float64, device=actor.device)
    for shard, values in zip(shards, old, strict=True):
        for micro_batch, ours in zip(shard, values, strict=False):  # values are empty but on the last stage
            theirs = actor.own_column(micro_batch, micro_batch.rollout_logprobs)
            s = mismatch_statistics(ours, theirs, torch.ones_like(theirs, dtype=torch.bool), cap)
            sums += torch.stack([s["tokens"], s["abs_diff_sum"], s["k3_sum"], s["truncated"]])
            peak = torch.maximum(peak, s["abs_diff_max"])
    dist.all_reduce(sums)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    tokens, absolute, k3, truncated = sums.tolist()
    n = max(tokens, 1.0)
    return {
        "mismatch/abs_mean": absolute / n,
        "mismatch/abs_max": float(peak),
        "mismatch/k3": k3 / n,
        "mismatch/truncated_share": truncated / n,
    }
