"""Every trained label is evaluated by exactly one rank, and the zig-zag is megatron-core's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.actor.slices import context_order, context_rows, own_rows
from dapo_megatron.batching.packing import pack_micro_batch
from dapo_megatron.batching.sample import training_sample
from tests.unit.batching.test_build import make_group, make_response


@st.composite
def micro_batches(draw):
    cp, tp = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    samples = []
    for i in range(draw(st.integers(0, 5))):
        n = draw(st.integers(1, 9))
        mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        response = make_response(f"p{i}", 0, list(range(10, 10 + n)), mask)
        samples.append(_sample(make_group(i, list(range(1, 1 + draw(st.integers(1, 5)))), [response])))
    sequence = 2 * cp if cp > 1 else 1
    return cp, tp, pack_micro_batch(samples, sequence, np.lcm(sequence, cp * tp))


def _sample(group):
    return training_sample(group.prompt, group.responses[0], 1.0)


@settings(deadline=None)
@given(micro_batches(), st.booleans())
def test_every_trained_label_has_one_owner(case, sequence_parallel):
    cp, tp, batch = case
    seen = []
    for cp_rank in range(cp):
        held = context_rows(batch.cu_seqlens, cp, cp_rank)
        shares = [
            own_rows(batch, cp_size=cp, cp_rank=cp_rank, tp_size=tp, tp_rank=r, sequence_parallel=sequence_parallel)
            for r in range(tp)
        ]
        n = shares[0].positions.size
        for r, share in enumerate(shares):
            assert share.positions.size == share.real.size == n >= 1
            assert np.array_equal(share.labels, shares[0].labels)
            assert np.array_equal(share.labels[r * n : (r + 1) * n], batch.labels[share.positions])
            # The hidden row that goes in is the one of the position that comes out.
            if sequence_parallel:
                local = held[r * held.size // tp :][share.hidden]
            else:
                local = held[share.hidden][r * n : (r + 1) * n]
            assert np.array_equal(local, share.positions)
            seen += share.positions[share.real].tolist()
    assert sorted(seen) == np.flatnonzero(batch.active).tolist()


@settings(deadline=None)
@given(micro_batches())
def test_context_rows_are_a_partition_that_context_order_undoes(case):
    cp, _, batch = case
    gathered = np.concatenate([context_rows(batch.cu_seqlens, cp, r) for r in range(cp)])
    assert np.array_equal(gathered[context_order(batch.cu_seqlens, cp)], np.arange(batch.tokens.size))


@pytest.mark.parametrize("cp", [2, 4])
def test_zigzag_by_hand(cp):
    """A sequence of 4 CP tokens, then one of 2 CP: as megatron-core's get_batch_on_this_cp_rank, one by one."""
    boundaries = np.array([0, 4 * cp, 6 * cp])
    for rank in range(cp):
        expected = []
        for start, length in ((0, 4 * cp), (4 * cp, 2 * cp)):
            chunks = torch.arange(start, start + length).chunk(2 * cp)
            expected += [*chunks[rank].tolist(), *chunks[2 * cp - 1 - rank].tolist()]
        assert context_rows(boundaries, cp, rank).tolist() == expected
