"""Kept groups -> mini-batches -> data-parallel shards -> packed micro-batches. Pure and deterministic.

Which groups share an update, and the weight of every token, are settled before the layout is looked at: the
update is the same under any data parallelism and any token budget.
"""

import hashlib
from collections.abc import Sequence

from dapo_megatron.algorithm.objective import Aggregation, token_weights
from dapo_megatron.batching.batch import MicroBatch, MiniBatch, StepBatch
from dapo_megatron.batching.packing import Sample, check_response, pack_micro_batch
from dapo_megatron.batching.partition import balance, pack
from dapo_megatron.records import Group


def build_step_batch(
    groups: Sequence[Group],
    *,
    step: int,
    version: int,
    seed: int,
    mini_batch_groups: int,
    aggregation: Aggregation,
    data_parallel_size: int,
    micro_batch_tokens: int,
    pad_multiple: int,
) -> StepBatch:
    """Batch the groups of one rollout step; their responses carry verdict, mask and advantage already.

    Args:
        groups: at least one; their order does not matter.
        version: policy version that is trained.
        seed: the run's; with `step` it decides which groups share a mini-batch.
        mini_batch_groups: groups of one update; the last mini-batch takes what is left over.
        micro_batch_tokens: budget of one micro-batch, padding included; a longer sequence stands alone.
        pad_multiple: every micro-batch is padded to a multiple of it (sequence parallelism, FP8).

    Raises:
        DapoError: a response whose per-token lists disagree, or a prompt without tokens.
        ValueError: no groups, or an unknown aggregation.
    """
    if not groups:
        raise ValueError("a step without groups has no batch")
    for group in groups:
        for response in group.responses:
            check_response(group.prompt, response)

    shuffled = sorted(groups, key=lambda group: _shuffle_key(seed, step, group))
    mini_batches = [
        _mini_batch(
            shuffled[start : start + mini_batch_groups],
            aggregation,
            data_parallel_size,
            micro_batch_tokens,
            pad_multiple,
        )
        for start in range(0, len(shuffled), mini_batch_groups)
    ]
    return StepBatch(step=step, version=version, mini_batches=mini_batches, metrics=_metrics(mini_batches))


def _shuffle_key(seed: int, step: int, group: Group) -> bytes:
    """Sorting by a hash is a shuffle that neither the input's order nor a library's version can change."""
    return hashlib.sha256(f"{seed}/{step}/{group.order}/{group.prompt.id}".encode()).digest()


def _mini_batch(
    groups: Sequence[Group], aggregation: Aggregation, ranks: int, micro_batch_tokens: int, pad_multiple: int
) -> MiniBatch:
    samples = _weighted_samples(groups, aggregation)
    budget = micro_batch_tokens // pad_multiple * pad_multiple

    def shard(items: list[int]) -> list[MicroBatch]:
        mine = [samples[i] for i in items]
        bins = pack([sample.length for sample in mine], budget) or [[]]
        return [pack_micro_batch([mine[i] for i in b], pad_multiple) for b in bins]

    return MiniBatch(shards=[shard(items) for items in balance([sample.length for sample in samples], ranks)])


def _weighted_samples(groups: Sequence[Group], aggregation: Aggregation) -> list[Sample]:
    active = [[sum(response.loss_mask) for response in group.responses] for group in groups]
    weights = token_weights(active, aggregation)
    return [
        Sample(group.prompt, response, weight)
        for group, group_weights in zip(groups, weights, strict=True)
        for response, weight in zip(group.responses, group_weights, strict=True)
    ]


def _metrics(mini_batches: Sequence[MiniBatch]) -> dict[str, float]:
    micro_batches = [mb for mini_batch in mini_batches for shard in mini_batch.shards for mb in shard]
    loads = [[sum(map(_real_tokens, shard)) for shard in mini_batch.shards] for mini_batch in mini_batches]
    tokens = sum(map(sum, loads))
    # The ranks meet after every update: the time lost is that of each update's heaviest rank, summed.
    heaviest, mean = sum(map(max, loads)), sum(sum(load) / len(load) for load in loads)
    return {
        "batch/sequences": float(sum(len(mb.sequences) for mb in micro_batches)),
        "batch/tokens": float(tokens),
        "batch/micro_batches": float(len(micro_batches)),
        "batch/real_token_share": tokens / sum(mb.tokens.size for mb in micro_batches),
        "batch/imbalance": heaviest / mean,
    }


def _real_tokens(micro_batch: MicroBatch) -> int:
    return int(micro_batch.cu_seqlens[len(micro_batch.sequences)])
