"""What one update minimises: the loss of each token, and the sums that metrics are made of.

An objective sees the trained tokens of one micro-batch and returns a loss per token; the actor multiplies by the
token's weight and sums. `metrics` turns sums over the whole mini-batch into what is reported.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from dapo_megatron.algorithm.importance import truncated_importance
from dapo_megatron.algorithm.objective import clip_higher
from dapo_megatron.config import AlgorithmConfig


@dataclass(frozen=True)
class TrainedTokens:
    """The trained tokens of one micro-batch; every tensor is [n] float32."""

    logprobs: torch.Tensor
    """Under the current weights, with gradient."""
    entropy: torch.Tensor
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor


class Objective(Protocol):
    """A loss per token and the names of its metric sums."""

    sums: ClassVar[tuple[str, ...]]

    def __call__(self, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss [n], metric sums [len(self.sums)])."""
        ...

    def metrics(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        """Metrics of the mini-batch from its sums and its number of trained tokens."""
        ...


@dataclass(frozen=True)
class PolicyObjective:
    """Clip-Higher with optional truncated importance sampling (algorithm/objective.py, algorithm/importance.py)."""

    algorithm: AlgorithmConfig
    sums: ClassVar[tuple[str, ...]] = ("entropy", "probability", "ratio", "clip_high", "clip_low", "k3")

    def __call__(self, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """See Objective."""
        a = self.algorithm
        clip = clip_higher(
            tokens.logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            eps_low=a.clip_low,
            eps_high=a.clip_high,
            clip_dual=a.clip_dual,
        )
        loss = clip.loss
        if a.importance_cap is not None:
            loss = loss * truncated_importance(tokens.old_logprobs, tokens.rollout_logprobs, a.importance_cap)
        # Schulman's k3 estimate of KL(old || current): samples come from the old policy.
        log_ratio = tokens.logprobs.detach() - tokens.old_logprobs
        per_token = (
            tokens.entropy,
            tokens.logprobs.detach().exp(),
            clip.ratio,
            clip.clipped_high,
            clip.clipped_low,
            log_ratio.exp() - 1 - log_ratio,
        )
        return loss, torch.stack([x.double().sum() for x in per_token])

    def metrics(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        """See Objective."""
        mean = {name: value / max(tokens, 1.0) for name, value in sums.items()}
        return {
            "policy/entropy": mean["entropy"],
            "policy/mean_probability": mean["probability"],
            "policy/ratio_mean": mean["ratio"],
            "policy/clip_high_share": mean["clip_high"],
            "policy/clip_low_share": mean["clip_low"],
            "policy/approx_kl": mean["k3"],
        }


@dataclass(frozen=True)
class SupervisedObjective:
    """Cross-entropy of the given tokens: how the demo's model is warmed up."""

    sums: ClassVar[tuple[str, ...]] = ("entropy", "probability")

    def __call__(self, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """See Objective."""
        return -tokens.logprobs, torch.stack(
            [tokens.entropy.double().sum(), tokens.logprobs.detach().double().exp().sum()]
        )

    def metrics(self, sums: dict[str, float], tokens: float) -> dict[str, float]:
        """See Objective."""
        return {f"supervised/{name}": value / max(tokens, 1.0) for name, value in sums.items()}
