"""DAPO's techniques and their switches."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class AlgorithmConfig(Section):
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip: the ratio is clipped at 1 - clip_low."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip (Clip-Higher): the ratio is clipped at 1 + clip_high."""
    clip_dual: float | None = Field(None, gt=1)
    """Dual clip for negative advantages: loss at most clip_dual * |A|; null is off, as in the paper."""
    aggregation: Literal["token", "group_token", "sample"] = "token"
    """What the loss is a mean of: the tokens of the mini-batch, of each group, or of each response."""
    dynamic_sampling: bool = True
    """Train only on groups that are neither all right nor all wrong; false trains on every group."""
    max_generation_rounds: int = Field(10, ge=1)
    """Rounds of generation in one step before a search for mixed groups is given up with an error. With
    rollout.max_policy_lag, as many groups as a step is expected to need are a round."""
    overlong_cache: int = Field(4096, ge=0)
    """L_cache in tokens: the soft punishment grows over the last overlong_cache tokens; 0 is off."""
    overlong_filtering: bool = False
    """Mask truncated responses out of the loss."""
    old_logprobs: Literal["actor", "rollout"] = "actor"
    """Where the ratio's denominator comes from: recomputed by the trainer, or the engine's own."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling: cap C on exp(old - rollout); null is off. Needs old_logprobs: actor."""
    shuffle_rewards: bool = False
    """Control experiment: permute the verdicts inside each group, so that nothing can be learned."""
