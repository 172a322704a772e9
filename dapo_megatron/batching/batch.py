"""A step's batch: mini-batches and their data-parallel shards, as sequences; and one packed micro-batch of them."""

import msgspec
import numpy as np

from dapo_megatron.batching.sample import TrainingSample

Shard = list[list[TrainingSample]]
"""What one replica trains in one update: the sequences of each micro-batch, none where it is padding alone."""


class MicroBatch(msgspec.Struct, eq=False):
    """Whole sequences packed one after the other: T tokens go through the model in one pass.

    Position t predicts token t + 1 of its sequence: what belongs to a token stands where it is the *label*.
    Padding has weight 0. Context parallelism pads each sequence at its end, where causal attention keeps it out of
    sight of the real tokens; what else is missing to the total is a sequence of its own, the last of `cu_seqlens`.
    """

    tokens: np.ndarray
    """[T] int64: prompt then response of each sequence; padding is 0."""
    labels: np.ndarray
    """[T] int64: the next token of the same sequence; 0 at its last position and in padding."""
    position_ids: np.ndarray
    """[T] int64: restarts at 0 with each sequence."""
    cu_seqlens: np.ndarray
    """[n + 1] int32: boundaries of the n sequences with their padding, from 0 to T."""
    weights: np.ndarray
    """[T] float32: weight of the label's loss; 0 for prompt, padding, masked tokens and last positions."""
    advantages: np.ndarray
    """[T] float32: advantage of the label's response; 0 where the label is no response token."""
    rollout_logprobs: np.ndarray
    """[T] float32: log-probability (natural log) the engine sampled the label with; 0 where there is none."""
    active: np.ndarray
    """[T] bool: the label is a response token that is trained."""
    sequences: list[tuple[str, int]]
    """(prompt id, sample index) of each sequence, in order, padding left out."""
    real_tokens: int
    """Tokens that are not padding."""


class MiniBatch(msgspec.Struct, eq=False):
    """One optimizer update."""

    shards: list[Shard]
    """[data-parallel rank]; each has at least one micro-batch."""


class StepBatch(msgspec.Struct, eq=False):
    """All updates of one rollout step."""

    step: int
    version: int
    """Policy version that is trained."""
    mini_batches: list[MiniBatch]
    metrics: dict[str, float] = {}
