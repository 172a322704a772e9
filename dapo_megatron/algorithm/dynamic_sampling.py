"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2, equation 11): train where 0 < number right < G."""

from collections.abc import Sequence
from typing import Literal

from dapo_megatron.algorithm.reward import Verdict

GroupOutcome = Literal["mixed", "all_right", "all_wrong"]


def group_outcome(verdicts: Sequence[Verdict | None]) -> GroupOutcome:
    """What the G responses of one prompt amount to; "unknown" counts as not right.

    Raises:
        ValueError: `verdicts` is empty.
    """
    if not verdicts:
        raise ValueError("a group without responses has no outcome")
    right = sum(verdict == "right" for verdict in verdicts)
    if right == 0:
        return "all_wrong"
    return "all_right" if right == len(verdicts) else "mixed"


def keep_group(verdicts: Sequence[Verdict | None]) -> bool:
    """True iff the group teaches something: 0 < number right < G.

    Decided on correctness, never on the shaped reward: an all-wrong group of unequal lengths has rewards
    that differ by the overlong penalty alone, and would be trained as if brevity were the task.
    """
    return group_outcome(verdicts) == "mixed"
