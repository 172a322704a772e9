"""What one update minimises: the loss of each token, and the values of each token that metrics are made of.

An objective sees the trained tokens of one micro-batch and returns a loss per token; the actor multiplies by the
token's weight and sums. Means and maxima over the whole mini-batch are its metrics.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from dapo_megatron.algorithm.importance import k3, mismatch, truncated_importance
from dapo_megatron.algorithm.objective import clip_higher
from dapo_megatron.config import AlgorithmConfig
from dapo_megatron.observe import catalog as m


@dataclass(frozen=True)
class TrainedTokens:
    """The trained tokens of one micro-batch; every tensor is [n] float32."""

    logprobs: torch.Tensor
    """Under the current weights, with gradient."""
    entropy: torch.Tensor
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor


@dataclass(frozen=True)
class TokenLosses:
    """What an objective makes of the trained tokens of one micro-batch; every tensor is [n]."""

    loss: torch.Tensor
    """float32, with gradient."""
    means: dict[str, torch.Tensor]
    """By metric: values that are averaged over the tokens of the mini-batch."""
    maxima: dict[str, torch.Tensor]
    """By metric: values, never negative, whose largest over the tokens of the mini-batch counts."""


class Objective(Protocol):
    """A loss per token, and the names of its metrics (every rank must know them, also one without tokens)."""

    @property
    def means(self) -> tuple[str, ...]:
        """Names of TokenLosses.means."""
        ...

    @property
    def maxima(self) -> tuple[str, ...]:
        """Names of TokenLosses.maxima."""
        ...

    def __call__(self, tokens: TrainedTokens) -> TokenLosses:
        """The losses and metrics of one micro-batch."""
        ...


DEFAULT_CAP = 2.0
"""C that the share of truncated tokens is reported for while truncated importance sampling is off."""


@dataclass(frozen=True)
class PolicyObjective:
    """Clip-Higher with optional truncated importance sampling (algorithm/objective.py, algorithm/importance.py)."""

    algorithm: AlgorithmConfig

    @property
    def means(self) -> tuple[str, ...]:
        """See Objective."""
        names = (m.ENTROPY, m.PROBABILITY, m.RATIO, m.CLIP_HIGH, m.CLIP_LOW, m.CLIP_DUAL, m.APPROX_KL)
        return names if self._is_engines_own else (*names, m.MISMATCH_MEAN, m.MISMATCH_K3, m.MISMATCH_TRUNCATED)

    @property
    def maxima(self) -> tuple[str, ...]:
        """See Objective."""
        return () if self._is_engines_own else (m.MISMATCH_MAX,)

    def __call__(self, tokens: TrainedTokens) -> TokenLosses:
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
        means = {
            m.ENTROPY: tokens.entropy,
            m.PROBABILITY: tokens.logprobs.detach().exp(),
            m.RATIO: clip.ratio,
            m.CLIP_HIGH: clip.clipped_high,
            m.CLIP_LOW: clip.clipped_low,
            m.CLIP_DUAL: clip.clipped_dual,
            m.APPROX_KL: k3(tokens.logprobs.detach() - tokens.old_logprobs),
        }
        if self._is_engines_own:
            return TokenLosses(loss, means, {})
        apart = mismatch(tokens.old_logprobs, tokens.rollout_logprobs, a.importance_cap or DEFAULT_CAP)
        means |= {m.MISMATCH_MEAN: apart.absolute, m.MISMATCH_K3: apart.k3, m.MISMATCH_TRUNCATED: apart.truncated}
        return TokenLosses(loss, means, {m.MISMATCH_MAX: apart.absolute})

    @property
    def _is_engines_own(self) -> bool:
        """The old log-probs are the engine's: nothing that could differ from them was computed."""
        return self.algorithm.old_logprobs == "rollout"


@dataclass(frozen=True)
class SupervisedObjective:
    """Cross-entropy of the given tokens: how the demo's model is warmed up."""

    means: ClassVar[tuple[str, ...]] = (m.SUPERVISED_ENTROPY, m.SUPERVISED_PROBABILITY)
    maxima: ClassVar[tuple[str, ...]] = ()

    def __call__(self, tokens: TrainedTokens) -> TokenLosses:
        """See Objective."""
        probability = tokens.logprobs.detach().double().exp()
        means = {m.SUPERVISED_ENTROPY: tokens.entropy, m.SUPERVISED_PROBABILITY: probability}
        return TokenLosses(-tokens.logprobs, means, {})
