"""The DAPO objective (arXiv 2503.14476, equations 8, 10, 12): Clip-Higher per token, and each token's weight.

The loss of a mini-batch is the sum over its tokens of weight * loss. Every denominator is in the weights,
known before the forward pass, so the sum may be split over micro-batches and ranks in any way.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token", "group_token", "sample"]

MAX_LOG_RATIO = 20.0
"""|log ratio| is clamped here: exp() of more overflows to inf, and inf * 0 in the backward pass is NaN."""


class ClipHigher(NamedTuple):
    """Per-token result of `clip_higher`; every tensor is [T]. A clipped token has gradient exactly zero."""

    loss: Tensor
    ratio: Tensor
    clipped_high: Tensor
    clipped_low: Tensor
    clipped_dual: Tensor


def clip_higher(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    clip_dual: float | None = None,
) -> ClipHigher:
    """Loss of each token: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logprobs - old_logprobs).

    Args:
        logprobs: [T] float32, natural log, of the policy that is trained; carries the gradient.
        old_logprobs: [T] float32, of the policy that generated; no gradient flows into it.
        advantages: [T] float32.
        eps_low, eps_high: the paper uses 0.2 and 0.28.
        clip_dual: c > 1; where A < 0 the loss is at most -c A (Dual-Clip PPO, arXiv 1912.09729). None: off,
            as in the paper.

    Returns:
        loss [T], differentiable; ratio [T], detached; clipped_high [T] bool (A > 0 and r > 1 + eps_high);
        clipped_low [T] bool (A < 0 and r < 1 - eps_low); clipped_dual [T] bool (A < 0 and r > c).

    Raises:
        ValueError: clip_dual <= 1, eps_low outside [0, 1) or eps_high < 0.
    """
    if not 0 <= eps_low < 1 or eps_high < 0:
        raise ValueError(f"Clip-Higher needs 0 <= eps_low < 1 and eps_high >= 0, got {eps_low} and {eps_high}")
    if clip_dual is not None and clip_dual <= 1:
        raise ValueError(f"clip_dual is a bound on the ratio above 1, got {clip_dual}")

    ratio = torch.exp((logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)

    ratio = ratio.detach()
    clipped_high = (advantages > 0) & (ratio > 1 + eps_high)
    clipped_low = (advantages < 0) & (ratio < 1 - eps_low)
    clipped_dual = torch.zeros_like(clipped_low)
    if clip_dual is not None:
        clipped_dual = (advantages < 0) & (ratio > clip_dual)
        loss = torch.where(clipped_dual, -clip_dual * advantages, loss)
    return ClipHigher(loss, ratio, clipped_high, clipped_low, clipped_dual)


def token_weights(active_tokens: Sequence[Sequence[int]], aggregation: Aggregation) -> list[list[float]]:
    """Weight of each active token of each response: the loss of the mini-batch is sum(weight * loss).

        token          1 / (tokens of the mini-batch)                     as the authors' released recipe
        group_token    1 / (active groups * tokens of its group)          the paper's equation 8
        sample         1 / (active responses * tokens of its response)    GRPO

    Args:
        active_tokens: [g][i], active (unmasked) response tokens of response i of group g, over the WHOLE
            mini-batch: all ranks, all micro-batches.
        aggregation: one of the three above.

    Returns:
        Weights in the shape of `active_tokens`. A fully masked response has 0 tokens and weight 0.0; it is
        not an active response, and a group of only such is not an active group. Nothing active: all are 0.0.

    Raises:
        ValueError: unknown aggregation.
    """
    group_tokens = [sum(group) for group in active_tokens]
    total_tokens = sum(group_tokens)
    active_groups = sum(tokens > 0 for tokens in group_tokens)
    active_responses = sum(tokens > 0 for group in active_tokens for tokens in group)

    def denominator(tokens: int, tokens_of_group: int) -> int:
        if aggregation == "token":
            return total_tokens
        if aggregation == "group_token":
            return active_groups * tokens_of_group
        if aggregation == "sample":
            return active_responses * tokens
        raise ValueError(f"unknown aggregation {aggregation!r}: choose token, group_token or sample")

    return [
        [1.0 / denominator(tokens, in_group) if tokens else 0.0 for tokens in group]
        for group, in_group in zip(active_tokens, group_tokens, strict=True)
    ]
