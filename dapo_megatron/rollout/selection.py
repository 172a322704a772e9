"""Dynamic sampling's decisions: what becomes of a group, which groups a step takes, how many to issue. Pure.

Among finished groups those that would be too old for the next step are taken, then the earliest issued: taking whoever
finishes first would favour short answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dapo_megatron.algorithm.dynamic_sampling import GroupOutcome, group_outcome
from dapo_megatron.config import RunConfig
from dapo_megatron.records import Group, ScoredGroup

Verdicted = Literal["kept", "all_right", "all_wrong"]

PRIOR_GROUPS = 4.0
MEMORY = 0.5
"""Weight of a group in the running share, one step later; a step or two old is still a fair forecast."""
MAX_OVERSAMPLE = 4.0
"""Most groups with the engines for one that is missing, however hard the data look."""


def fate_of(group: Group, config: RunConfig) -> Verdicted:
    """Whether a graded group is trained, or why not."""
    if not config.algorithm.dynamic_sampling:
        return "kept"
    outcome = outcome_of(group, config)
    return "kept" if outcome == "mixed" else outcome


def outcome_of(group: Group, config: RunConfig) -> GroupOutcome:
    """What a graded group amounts to.

    With grading.unknown=mask, responses without a verdict do not count: right ones alone do not make a group mixed.
    """
    masked = config.grading.unknown == "mask"
    verdicts = [r.verdict for r in group.responses if not (masked and r.verdict == "unknown")]
    return group_outcome(verdicts) if verdicts else "all_wrong"


def take(kept: Sequence[ScoredGroup], wanted: int, oldest: int) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """(the groups of this step, those carried into the next one), both in issue order.

    Args:
        oldest: policy version that the next step may still train; groups with an older token are taken first.
    """
    in_order = sorted(kept, key=lambda g: (g.oldest_version >= oldest, g.order))
    used, carried = in_order[:wanted], in_order[wanted:]
    return sorted(used, key=lambda g: g.order), sorted(carried, key=lambda g: g.order)


def by_age(carried: Sequence[ScoredGroup], oldest: int) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """(groups whose every token is of policy version `oldest` or newer, the others)."""
    return [g for g in carried if g.oldest_version >= oldest], [g for g in carried if g.oldest_version < oldest]


def groups_to_issue(missing: int, in_flight: int, share: float, sigmas: float) -> int:
    """Groups to issue beside those in flight, so that `missing` of all of them are kept with a margin.

    Of n groups, each kept with probability p, n p are expected to be, with a standard deviation of sqrt(n p (1 - p)).

    Args:
        share: p.
        sigmas: standard deviations of the margin.
    """
    if missing <= 0:
        return 0
    p = max(share, 1 / MAX_OVERSAMPLE)
    spread = sigmas * math.sqrt(1 - p)
    # n p - spread sqrt(n p) = missing, solved for sqrt(n p).
    expected = ((spread + math.sqrt(spread**2 + 4 * missing)) / 2) ** 2
    return max(0, min(math.ceil(expected / p - 1e-9), math.ceil(missing * MAX_OVERSAMPLE)) - in_flight)


@dataclass
class Share:
    """Running share of groups kept: every group counts alike, those of earlier steps less and less."""

    kept: float = PRIOR_GROUPS
    seen: float = PRIOR_GROUPS
    """Before anything is known, all are expected to be kept."""

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return self.kept / self.seen

    def count(self, *, kept: bool) -> None:
        """One more group is graded."""
        self.kept += kept
        self.seen += 1

    def age(self) -> None:
        """A step is over."""
        self.kept *= MEMORY
        self.seen *= MEMORY
