"""Verdicts -> rewards, advantages and loss masks of one group. Pure."""

import random

import torch

from dapo_megatron.algorithm.advantage import group_advantages
from dapo_megatron.algorithm.overlong import overlong_penalty
from dapo_megatron.algorithm.reward import accuracy_reward
from dapo_megatron.config import RunConfig
from dapo_megatron.records import Group


def score_group(group: Group, config: RunConfig) -> None:
    """Fill in rewards, advantages and masks of a group whose verdicts are known; the group is changed in place.

    With grading.unknown=mask, responses without a verdict are left out of the loss and of the group's statistics. With
    algorithm.overlong_filtering, truncated responses are left out of the loss only.
    """
    algorithm = config.algorithm
    if algorithm.shuffle_rewards:
        verdicts = [r.verdict for r in group.responses]
        random.Random(f"{config.seed}/{group.order}").shuffle(verdicts)
        for response, verdict in zip(group.responses, verdicts, strict=True):
            response.verdict = verdict
    for r in group.responses:
        r.accuracy_reward = accuracy_reward(r.verdict)
        r.overlong_penalty = overlong_penalty(
            len(r.token_ids), config.rollout.max_response_tokens, algorithm.overlong_cache
        )
    known = [r for r in group.responses if r.verdict != "unknown" or config.grading.unknown == "wrong"]
    if len(known) >= 2:
        advantages = group_advantages(torch.tensor([r.reward for r in known], dtype=torch.float64))
        for response, advantage in zip(known, advantages.tolist(), strict=True):
            response.advantage = advantage
    for r in group.responses:
        masked = (r.verdict == "unknown" and config.grading.unknown == "mask") or (
            algorithm.overlong_filtering and r.finish_reason == "length"
        )
        if masked:
            r.loss_mask = [False] * len(r.token_ids)
