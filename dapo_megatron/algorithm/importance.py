"""Truncated importance sampling between the engine that sampled and the trainer (off in the paper's recipe).

The engine and the trainer compute the same log-prob with different kernels, so old policy and sampling policy
differ a little. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training".
"""

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


def mismatch_statistics(
    old_logprobs: Tensor, rollout_logprobs: Tensor, active_mask: Tensor, cap: float
) -> dict[str, Tensor]:
    """How far trainer and engine are apart, over the active tokens.

    Args:
        old_logprobs, rollout_logprobs, cap: as in `truncated_importance`; inactive tokens are ignored.
        active_mask: [T] bool, True for the response tokens that are trained.

    Returns:
        Scalars, float64, with d = old - rollout. All but the last are SUMS over tokens (all-reduce with SUM,
        divide by "tokens"): "tokens"; "abs_diff_sum", |d|; "k1_sum" and "k3_sum", the estimators -d and
        exp(d) - 1 - d of KL(rollout || old) for tokens drawn from rollout (Schulman 2020, "Approximating KL
        divergence"); "truncated", tokens with exp(d) > cap.
        "abs_diff_max" is a MAX (all-reduce with MAX), 0 without active tokens.
    """
    difference = (old_logprobs.detach() - rollout_logprobs.detach()).double()
    difference = torch.where(active_mask, difference, 0.0)
    ratio = difference.exp()
    return {
        "tokens": active_mask.sum().double(),
        "abs_diff_sum": difference.abs().sum(),
        "k1_sum": -difference.sum(),
        "k3_sum": (ratio - 1 - difference).sum(),
        "truncated": ((ratio > cap) & active_mask).sum().double(),
        "abs_diff_max": difference.abs().max() if difference.numel() else difference.new_zeros(()),
    }
