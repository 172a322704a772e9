"""Sequences -> packed micro-batches: the arrays that the actor reads. Done by the rank that trains them."""

from collections.abc import Sequence

import numpy as np

from dapo_megatron.batching.batch import MicroBatch, Shard
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.batching.sample import TrainingSample


def padded(count: int, multiple: int) -> int:
    """The smallest multiple that is not less than `count`."""
    return -(-count // multiple) * multiple


def packed_lengths(shard: Shard, rules: PackingRules) -> list[int]:
    """Tokens of each micro-batch of a shard, padding included."""
    lengths = []
    for samples in shard:
        real = sum(padded(sample.length, rules.sequence_multiple) for sample in samples)
        lengths.append(padded(max(real, 1), rules.total_multiple))
    return [max(lengths)] * len(lengths) if rules.equal_lengths else lengths


def pack_shard(shard: Shard, rules: PackingRules) -> list[MicroBatch]:
    """The micro-batches of a shard."""
    return [
        pack_micro_batch(samples, rules.sequence_multiple, rules.total_multiple, length)
        for samples, length in zip(shard, packed_lengths(shard, rules), strict=True)
    ]


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
