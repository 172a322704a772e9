"""Sequences -> one packed micro-batch: the arrays that the actor reads."""

from collections.abc import Sequence

import numpy as np

from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.batching.sample import TrainingSample


def padded(count: int, multiple: int) -> int:
    """The smallest multiple that is not less than `count`."""
    return -(-count // multiple) * multiple


def pack_micro_batch(
    samples: Sequence[TrainingSample], sequence_multiple: int = 1, total_multiple: int = 1, at_least: int = 1
) -> MicroBatch:
    """Concatenate `samples`, each padded to a multiple of `sequence_multiple` tokens.

    The total is padded to a multiple of `total_multiple`, not less than `at_least`. Without samples the result is
    padding alone: what a data-parallel rank without work runs.
    """
    lengths = [padded(sample.length, sequence_multiple) for sample in samples]
    padding = padded(max(sum(lengths), at_least), total_multiple) - sum(lengths)
    if padding:
        lengths.append(padding)
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    total = int(cu_seqlens[-1])

    batch = MicroBatch(
        tokens=np.zeros(total, np.int64),
        labels=np.zeros(total, np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=cu_seqlens,
        weights=np.zeros(total, np.float32),
        advantages=np.zeros(total, np.float32),
        rollout_logprobs=np.zeros(total, np.float32),
        active=np.zeros(total, np.bool_),
        sequences=[sample.source for sample in samples],
        real_tokens=sum(sample.length for sample in samples),
    )
    for sample, start in zip(samples, cu_seqlens.tolist(), strict=False):
        _write(batch, sample, start)
    return batch


def _write(batch: MicroBatch, sample: TrainingSample, start: int) -> None:
    end = start + sample.length
    batch.tokens[start:end] = sample.token_ids
    batch.labels[start : end - 1] = batch.tokens[start + 1 : end]

    # The prompt's last token predicts the response's first, so labels lie one position before their tokens.
    labels = slice(start + sample.prompt_length - 1, end - 1)
    batch.active[labels] = sample.loss_mask
    batch.weights[labels] = np.where(sample.loss_mask, sample.weight, 0.0)
    batch.advantages[labels] = sample.advantage
    batch.rollout_logprobs[labels] = sample.logprobs
