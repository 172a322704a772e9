import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.batching.partition import balance, pack

lengths_lists = st.lists(st.integers(1, 60), max_size=40)


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 9))
def test_balance_places_every_item_once_and_bounds_the_heaviest_shard(lengths, shards):
    parts = balance(lengths, shards)

    assert sorted(item for part in parts for item in part) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in part) for part in parts]
    assert max(loads) * shards <= sum(loads) + max(lengths, default=0) * (shards - 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 3))
def test_balance_is_within_grahams_bound_of_the_best_split(lengths, shards):
    parts = balance(lengths, shards)

    heaviest = max(sum(lengths[item] for item in part) for part in parts)
    splits = itertools.product(range(shards), repeat=len(lengths))
    best = min(
        max(sum(n for n, at in zip(lengths, split, strict=True) if at == shard) for shard in range(shards))
        for split in splits
    )
    assert heaviest * 3 * shards <= best * (4 * shards - 1)


def test_balance_by_hand():
    # 9 and 8 open a shard each, 7 joins 8, 6 joins 9, then the shards are equal and the lower one gets 5.
    assert balance([5, 6, 7, 8, 9], 2) == [[4, 1, 0], [3, 2]]
    assert balance([3], 3) == [[0], [], []]


@settings(deadline=None)
@given(lengths_lists, st.integers(0, 80))
def test_pack_respects_the_budget_and_leaves_no_two_bins_to_merge(lengths, budget):
    bins = pack(lengths, budget)

    assert sorted(item for b in bins for item in b) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in b) for b in bins]
    assert all(b for b in bins)
    assert all(load <= budget or len(b) == 1 for load, b in zip(loads, bins, strict=True))
    assert all(x + y > budget for i, x in enumerate(loads) for y in loads[:i])


@settings(deadline=None)
@given(lengths_lists, st.integers(0, 80))
def test_pack_puts_each_item_into_the_fullest_bin_that_holds_it(lengths, budget):
    bins = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        loads = [sum(lengths[i] for i in b) for b in bins]
        fits = [b for b, load in enumerate(loads) if load + lengths[item] <= budget]
        if fits:
            bins[max(fits, key=lambda b: (loads[b], -b))].append(item)
        else:
            bins.append([item])
    assert pack(lengths, budget) == bins


def test_pack_by_hand():
    # 12 exceeds the budget; 8 and 5 open bins (8 + 5 > 10); 4 fits with 5 only; 2 fills the bin of 8.
    assert pack([8, 5, 4, 2, 12], 10) == [[4], [0, 3], [1, 2]]
    # 4 fits beside 6 and beside 5, and goes where it leaves less room.
    assert pack([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
