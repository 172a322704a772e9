"""Truncated importance sampling between the engine that sampled and the trainer (off in the paper's recipe).

The engine and the trainer compute the same log-prob with different kernels, so old policy and sampling policy
differ a little. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training".
"""

from typing import NamedTuple

import torch
from torch import Tensor


def truncated_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Factor on the loss of each token: min(exp(old - rollout), cap), without gradient.

    Args:
        old_logprobs: [T] float32, natural log, computed by the trainer with the weights that generated.
        rollout_logprobs: [T] float32, natural log, that the engine returned with the tokens.
        cap: C > 0; 2.0 is usual.

    Returns:
        [T] float32 in [0, cap].
    """
    return torch.exp(old_logprobs.detach() - rollout_logprobs.detach()).clamp(max=cap)


class Mismatch(NamedTuple):
    """How far trainer and engine are apart; every tensor is [T] float64, without gradient."""

    absolute: Tensor
    """|old - rollout|"""
    k3: Tensor
    """Its mean estimates KL(rollout || old)."""
    truncated: Tensor
    """1 where exp(old - rollout) > cap, else 0."""


def mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Mismatch:
    """The distance of each token's log-probs; arguments as in `truncated_importance`."""
    difference = old_logprobs.detach().double() - rollout_logprobs.detach().double()
    return Mismatch(difference.abs(), k3(difference), (difference.exp() > cap).double())


def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - 1 - d of each token, d = log p - log q: the mean over tokens drawn from q estimates KL(q || p).

    Not negative, but for rounding. Source: Schulman 2020, "Approximating KL divergence".
    """
    return torch.expm1(log_ratio) - log_ratio
