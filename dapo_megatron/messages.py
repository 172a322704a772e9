"""What trainer and controller say to each other. The trainer asks, the controller answers.

Rank 0 asks for everything but the parts of a batch: these, the first rank of each replica asks for.
"""

import msgspec

from dapo_megatron.errors import Kind


class RestoreState(msgspec.Struct, tag=True):
    """A part of the controller's state out of the checkpoint that is resumed; Hello follows the last one."""

    payload: bytes


class Hello(msgspec.Struct, tag=True):
    """The trainer is up."""

    step: int
    """The last finished step; 0 at the start."""
    resumes: bool = False
    """Whether it goes on from a checkpoint, whose state the controller has been given."""


class NextBatch(msgspec.Struct, tag=True):
    """Version `version` is live on the engines; send the batch of `step`."""

    step: int
    version: int


class FetchPart(msgspec.Struct, tag=True):
    """Send a part of the batch of `step`; numbers are from 0."""

    step: int
    update: int
    replica: int
    part: int


class FetchState(msgspec.Struct, tag=True):
    """Send a part, from 0, of the controller's state that belongs to the batch of `step`."""

    step: int
    part: int


class BeginEvaluation(msgspec.Struct, tag=True):
    """Evaluate version `version`, which is live, on the held-out prompts, beside what is asked next."""

    step: int
    version: int


class Evaluate(msgspec.Struct, tag=True):
    """Evaluate version `version`, which is live, on the held-out prompts; or send what was begun for this step."""

    step: int
    version: int


class Goodbye(msgspec.Struct, tag=True):
    """The run is over."""


class Welcome(msgspec.Struct, tag=True):
    """The controller is ready."""

    verify_prompts: list[list[int]]
    """Fixed prompts whose log-probs are compared after a push."""


class Batch(msgspec.Struct, tag=True):
    """A step's batch can be fetched, and the controller's state that a checkpoint of the step keeps."""

    parts: list[list[int]]
    """[update][replica]: parts to fetch."""
    metrics: dict[str, float]
    """Of the rollout."""
    state_parts: int
    """Of the state."""


class Part(msgspec.Struct, tag=True):
    """Of a batch (batching.wire), or of the controller's state (data.snapshot)."""

    payload: bytes


class Evaluation(msgspec.Struct, tag=True):
    """Metrics of an evaluation."""

    metrics: dict[str, float]


class Done(msgspec.Struct, tag=True):
    """Nothing to say."""


class Failed(msgspec.Struct, tag=True):
    """The controller gave up, for this reason."""

    kind: Kind
    reason: str


Request = RestoreState | Hello | NextBatch | FetchPart | FetchState | BeginEvaluation | Evaluate | Goodbye
Reply = Welcome | Batch | Part | Evaluation | Done | Failed
