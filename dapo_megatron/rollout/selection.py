"""Dynamic sampling's decisions: what becomes of a group, which groups a step takes, how many to issue. Pure.

Among finished groups the earliest issued are taken: taking whoever finishes first would favour short answers.
"""

import math
from collections.abc import Sequence
from typing import Literal

from dapo_megatron.algorithm.dynamic_sampling import group_outcome
from dapo_megatron.config import RunConfig
from dapo_megatron.records import Group, ScoredGroup

Verdicted = Literal["kept", "all_right", "all_wrong"]

KEPT_SHARE_MEMORY = 0.7
"""Weight of the past in the running share of groups kept; a step or two old is still a fair forecast."""
MAX_OVERSAMPLE = 4.0
"""Most groups issued for one missing group in a round, however hard the data look."""


def fate_of(group: Group, config: RunConfig) -> Verdicted:
    """Whether a graded group is trained, or why not.

    With grading.unknown=mask, responses without a verdict do not count: right ones alone do not make a group mixed.
    """
    if not config.algorithm.dynamic_sampling:
        return "kept"
    masked = config.grading.unknown == "mask"
    verdicts = [r.verdict for r in group.responses if not (masked and r.verdict == "unknown")]
    outcome = group_outcome(verdicts) if verdicts else "all_wrong"
    return "kept" if outcome == "mixed" else outcome


def take(kept: Sequence[ScoredGroup], wanted: int) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """(the groups of this step, those carried into the next one), both in issue order."""
    in_order = sorted(kept, key=lambda g: g.order)
    return in_order[:wanted], in_order[wanted:]


def by_age(carried: Sequence[ScoredGroup], oldest: int) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """(groups whose every token is of policy version `oldest` or newer, the others)."""
    return [g for g in carried if g.oldest_version >= oldest], [g for g in carried if g.oldest_version < oldest]


def round_size(deficit: int, kept_share: float) -> int:
    """Groups to issue so that `deficit` of them may be expected to be kept."""
    return math.ceil(deficit * min(MAX_OVERSAMPLE, 1 / max(kept_share, 1e-6)))


def updated_share(kept_share: float, seen: float) -> float:
    """The running share of groups kept, after a round in which `seen` of them were."""
    return KEPT_SHARE_MEMORY * kept_share + (1 - KEPT_SHARE_MEMORY) * seen
