"""Rule-based reward (DAPO, arXiv 2503.14476, section 2.4): +1 for a right final answer, -1 otherwise."""

from typing import Literal

Verdict = Literal["right", "wrong", "unknown"]
"""What a grader says of one response. "unknown": the grader was killed, crashed or raised."""


def accuracy_reward(verdict: Verdict | None) -> float:
    """R_acc of one response: +1.0 if "right", else -1.0.

    "unknown" scores -1.0: rewarding what cannot be graded would teach the policy to break the grader.
    The reward of a response is R = R_acc + R_len, with R_len from `overlong.overlong_penalty`.
    """
    return 1.0 if verdict == "right" else -1.0
