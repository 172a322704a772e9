"""What one update minimises: the loss of each token, and the sums and peaks that metrics are made of.

An objective sees the trained tokens of one micro-batch and returns a loss per token; the actor multiplies by the
token's weight and sums. `metrics` turns sums and peaks over the whole mini-batch into what is reported.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from dapo_megatron.algorithm.importance import k3, mismatch, truncated_importance
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
    """A loss per token and the names of what its metrics are made of."""

    sums: ClassVar[tuple[str, ...]]
    """Added up over the tokens of the mini-batch."""
    peaks: ClassVar[tuple[str, ...]]
    """Largest of values that are never negative, over the tokens of the mini-batch."""

    def __call__(self, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss [n], sums [len(self.sums)] float64, peaks [len(self.peaks)] float64)."""
        ...

    def metrics(self, sums: dict[str, float], peaks: dict[str, float], tokens: float) -> dict[str, float]:
        """Metrics of the mini-batch from its sums, its peaks and its number of trained tokens."""
        ...


DEFAULT_CAP = 2.0
"""C that the share of truncated tokens is reported for while truncated importance sampling is off."""


@dataclass(frozen=True)
class PolicyObjective:
    """Clip-Higher with optional truncated importance sampling (algorithm/objective.py, algorithm/importance.py)."""

    algorithm: AlgorithmConfig
    sums: ClassVar[tuple[str, ...]] = (
        *("entropy", "probability", "ratio", "clip_high", "clip_low", "clip_dual", "kl"),
        *("mismatch_abs", "mismatch_k3", "mismatch_truncated"),
    )
    peaks: ClassVar[tuple[str, ...]] = ("mismatch_abs",)

    def __call__(self, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        apart = mismatch(tokens.old_logprobs, tokens.rollout_logprobs, a.importance_cap or DEFAULT_CAP)
        per_token = (
            tokens.entropy,
            tokens.logprobs.detach().exp(),
            clip.ratio,
            clip.clipped_high,
            clip.clipped_low,
            clip.clipped_dual,
            k3(tokens.logprobs.detach() - tokens.old_logprobs),
            *apart,
        )
        peak = apart.absolute.max() if len(apart.absolute) else apart.absolute.new_zeros(())
        return loss, torch.stack([x.double().sum() for x in per_token]), peak[None]

    def metrics(self, sums: dict[str, float], peaks: dict[str, float], tokens: float) -> dict[str, float]:
        """See Objective."""
        mean = {name: value / max(tokens, 1.0) for name, value in sums.items()}
        found = {
            "policy/entropy": mean["entropy"],
            "policy/mean_probability": mean["probability"],
            "policy/ratio_mean": mean["ratio"],
            "policy/clip_high_share": mean["clip_high"],
            "policy/clip_low_share": mean["clip_low"],
            "policy/clip_dual_share": mean["clip_dual"],
            "policy/approx_kl": mean["kl"],
        }
        if self.algorithm.old_logprobs == "rollout":  # nothing that could differ was computed
            return found
        return found | {
            "mismatch/abs_mean": mean["mismatch_abs"],
            "mismatch/abs_max": peaks["mismatch_abs"],
            "mismatch/k3": mean["mismatch_k3"],
            "mismatch/truncated_share": mean["mismatch_truncated"],
        }


@dataclass(frozen=True)
class SupervisedObjective:
    """Cross-entropy of the given tokens: how the demo's model is warmed up."""

    sums: ClassVar[tuple[str, ...]] = ("entropy", "probability")
    peaks: ClassVar[tuple[str, ...]] = ()

    def __call__(self, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See Objective."""
        sums = torch.stack([tokens.entropy.double().sum(), tokens.logprobs.detach().double().exp().sum()])
        return -tokens.logprobs, sums, sums.new_empty(0)

    def metrics(self, sums: dict[str, float], peaks: dict[str, float], tokens: float) -> dict[str, float]:
        """See Objective."""
        return {f"supervised/{name}": value / max(tokens, 1.0) for name, value in sums.items()}
