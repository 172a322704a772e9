"""Kept groups -> mini-batches -> data-parallel shards -> micro-batches. Pure and deterministic.

Which groups share an update, and the weight of every token, are settled before the layout is looked at: the
update is the same under any data parallelism and any token budget.
"""

import hashlib
from collections.abc import Sequence

from dapo_megatron.algorithm.objective import Aggregation
from dapo_megatron.batching.batch import MicroBatch, MiniBatch, Shard, StepBatch
from dapo_megatron.batching.packing import pack_shard, packed_lengths, padded
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.batching.partition import balance, pack
from dapo_megatron.batching.sample import TrainingSample, check_response, weighted_samples
from dapo_megatron.observe import catalog as m
from dapo_megatron.records import ScoredGroup


def build_step_batch(
    groups: Sequence[ScoredGroup],
    *,
    step: int,
    version: int,
    seed: int,
    mini_batch_groups: int,
    aggregation: Aggregation,
    rules: PackingRules,
) -> StepBatch:
    """Batch the groups of one rollout step; their responses carry verdict, mask and advantage already.

    Args:
        groups: at least one; their order does not matter.
        version: policy version that is trained.
        seed, step: decide which groups share a mini-batch.
        mini_batch_groups: groups of one update; the last mini-batch takes what is left over.
        rules: what the layout demands of micro-batches.

    Raises:
        DapoError: a response whose per-token arrays disagree, or a prompt without tokens.
        ValueError: no groups, or an unknown aggregation.
    """
    if not groups:
        raise ValueError("a step without groups has no batch")
    for group in groups:
        for response in group.responses:
            check_response(group.prompt, response)

    shuffled = sorted(groups, key=lambda group: _shuffle_key(seed, step, group))
    parts = [shuffled[i : i + mini_batch_groups] for i in range(0, len(shuffled), mini_batch_groups)]
    mini_batches = [MiniBatch(spread(weighted_samples(part, aggregation), rules)) for part in parts]
    return StepBatch(step, version, mini_batches, _metrics(mini_batches, rules))


def spread(samples: Sequence[TrainingSample], rules: PackingRules) -> list[Shard]:
    """Spread samples over the data-parallel ranks, and each rank's over micro-batches.

    Where the layout asks for more micro-batches than there is work for, the rest is padding alone.
    """
    lengths = [padded(sample.length, rules.sequence_multiple) for sample in samples]
    budget = rules.micro_batch_tokens // rules.total_multiple * rules.total_multiple
    shards: list[Shard] = []
    for items in balance(lengths, rules.data_parallel_size):
        packed = pack([lengths[i] for i in items], budget) or [[]]
        shards.append([[samples[items[i]] for i in b] for b in packed])
    most = max(len(shard) for shard in shards)
    for shard in shards:
        wanted = padded(most if rules.equal_counts else len(shard), rules.count_multiple)
        shard += [[] for _ in range(wanted - len(shard))]
    return shards


def is_spread_for(shards: Sequence[Shard], rules: PackingRules) -> bool:
    """Whether a layout can train shards, one a replica, as they are."""
    counts = [len(shard) for shard in shards]
    are_equal = len(set(counts)) == 1 or not rules.equal_counts
    return len(counts) == rules.data_parallel_size and are_equal and not any(n % rules.count_multiple for n in counts)


def shard_samples(samples: Sequence[TrainingSample], rules: PackingRules) -> list[list[MicroBatch]]:
    """Spread samples over the data-parallel ranks and pack each rank's into micro-batches."""
    return [pack_shard(shard, rules) for shard in spread(samples, rules)]


def _shuffle_key(seed: int, step: int, group: ScoredGroup) -> bytes:
    """Sorting by a hash is a shuffle that neither the input's order nor a library's version can change."""
    return hashlib.sha256(f"{seed}/{step}/{group.order}/{group.prompt.id}".encode()).digest()


def _metrics(mini_batches: Sequence[MiniBatch], rules: PackingRules) -> dict[str, float]:
    shards = [shard for mini_batch in mini_batches for shard in mini_batch.shards]
    loads = [[_tokens(shard) for shard in mini_batch.shards] for mini_batch in mini_batches]
    tokens = sum(map(sum, loads))
    # The ranks meet after every update: the time lost is that of each update's heaviest rank, summed.
    heaviest, mean = sum(map(max, loads)), sum(sum(load) / len(load) for load in loads)
    return {
        m.BATCH_SEQUENCES: float(sum(len(micro_batch) for shard in shards for micro_batch in shard)),
        m.BATCH_TOKENS: float(tokens),
        m.BATCH_MICRO_BATCHES: float(sum(map(len, shards))),
        m.BATCH_REAL_SHARE: tokens / sum(sum(packed_lengths(shard, rules)) for shard in shards),
        m.BATCH_IMBALANCE: heaviest / mean,
    }


def _tokens(shard: Shard) -> int:
    return sum(sample.length for micro_batch in shard for sample in micro_batch)
