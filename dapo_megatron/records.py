"""The records that travel: a prompt, a response to it, and the group of responses to one prompt.

They carry what deeper asynchrony needs (version spans, per-token masks, turns), and a schema version, because they are
also what batch dumps and checkpoints hold. What has one entry a token is a numpy array.
"""

from typing import Literal

import msgspec
import numpy as np

from dapo_megatron.algorithm.reward import Verdict

SCHEMA = 3


class Prompt(msgspec.Struct, frozen=True):
    """One question, ready to be sent to an engine."""

    id: str
    """Stable name: source file and row."""
    input_ids: list[int]
    ground_truth: str
    text: str
    """The question as a person reads it."""
    row: int
    """Row in the source file, from 0."""
    alternatives: list[str] = []
    """Further ground truths that are right too."""


class VersionSpan(msgspec.Struct, array_like=True, frozen=True):
    """Tokens [start, end) of a response were sampled by this policy version."""

    version: int
    start: int
    end: int


class Response(msgspec.Struct, eq=False):
    """One sampled response of n tokens.

    A user's rollout function may give lists for arrays: rollout.guard makes arrays of them.
    """

    prompt_id: str
    sample: int
    """Index within the group, from 0."""
    token_ids: np.ndarray
    """[n] int32, as the engine returned them, the stop token included: text is never tokenised again."""
    loss_mask: np.ndarray
    """[n] bool: False where a token is not the policy's own (tool output) or must not be trained."""
    rollout_logprobs: np.ndarray
    """[n] float32: log-probability (natural log) with which the engine sampled each token, after temperature."""
    version_spans: list[VersionSpan]
    finish_reason: Literal["stop", "length"]
    text: str
    verdict: Verdict | None = None
    """None: not graded yet. A rollout function that knows (an environment) sets it, and no grader is asked."""
    accuracy_reward: float | None = None
    """R_acc; None: it follows from the verdict. A rollout function may bring its own; positive is then right."""
    overlong_penalty: float = 0.0
    advantage: float = 0.0
    turns: int = 1
    token_arrays: dict[str, np.ndarray] = {}
    """Optional per-token arrays by name (routed experts, for example); [n] numbers or truth values."""
    schema: int = SCHEMA

    @property
    def generated_tokens(self) -> int:
        """Those that a policy sampled; the others are a tool's."""
        return sum(span.end - span.start for span in self.version_spans)

    @property
    def reward(self) -> float:
        """R = R_acc + R_len."""
        return (self.accuracy_reward or 0.0) + self.overlong_penalty


class Group(msgspec.Struct, eq=False):
    """The G responses to one prompt."""

    order: int
    """Issue order: groups are consumed by it, never by who finished first."""
    prompt: Prompt
    responses: list[Response]

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled a token of this group."""
        return min(span.version for response in self.responses for span in response.version_spans)


class ScoredGroup(Group):
    """A group whose responses carry rewards, advantages and the masks that follow from their verdicts."""
