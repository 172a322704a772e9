"""Verdicts -> rewards, advantages and loss masks of one group. Pure."""

import random

import msgspec
import numpy as np
import torch

from dapo_megatron.algorithm.advantage import group_advantages
from dapo_megatron.algorithm.overlong import overlong_penalty
from dapo_megatron.algorithm.reward import Verdict, accuracy_reward
from dapo_megatron.config import RunConfig
from dapo_megatron.records import Group, Response, ScoredGroup


def score_group(group: Group, config: RunConfig) -> ScoredGroup:
    """A copy of a group whose verdicts are known, with rewards, advantages and masks.

    With grading.unknown=mask, responses without a verdict are left out of the loss and of the group's statistics. With
    algorithm.overlong_filtering, truncated responses are left out of the loss only.
    """
    responses = [
        msgspec.structs.replace(
            r,
            verdict=verdict,
            accuracy_reward=accuracy_reward(verdict) if own_reward is None else own_reward,
            overlong_penalty=overlong_penalty(
                r.generated_tokens, config.rollout.max_response_tokens, config.algorithm.overlong_cache
            ),
        )
        for r, (verdict, own_reward) in zip(group.responses, _judgements(group, config), strict=True)
    ]
    advantages = _advantages(responses, config)
    scored = [
        msgspec.structs.replace(
            r, advantage=a, loss_mask=np.zeros(len(r.token_ids), np.bool_) if _is_masked(r, config) else r.loss_mask
        )
        for r, a in zip(responses, advantages, strict=True)
    ]
    return ScoredGroup(group.order, group.prompt, scored)


def _judgements(group: Group, config: RunConfig) -> list[tuple[Verdict | None, float | None]]:
    """(verdict, reward of the rollout's own) of each response; shuffled, together, for the control experiment."""
    judgements = [(r.verdict, r.accuracy_reward) for r in group.responses]
    if config.algorithm.shuffle_rewards:
        random.Random(f"{config.seed}/{group.order}").shuffle(judgements)
    return judgements


def _advantages(responses: list[Response], config: RunConfig) -> list[float]:
    """0 for a response without a verdict that is masked, and in a group with fewer than two others."""
    advantages = [0.0] * len(responses)
    known = [i for i, r in enumerate(responses) if not _is_unknown(r, config)]
    if len(known) >= 2:
        found = group_advantages(torch.tensor([responses[i].reward for i in known], dtype=torch.float64))
        for i, advantage in zip(known, found.tolist(), strict=True):
            advantages[i] = advantage
    return advantages


def _is_unknown(response: Response, config: RunConfig) -> bool:
    return config.grading.unknown == "mask" and response.verdict == "unknown"


def _is_masked(response: Response, config: RunConfig) -> bool:
    truncated = config.algorithm.overlong_filtering and response.finish_reason == "length"
    return _is_unknown(response, config) or truncated
