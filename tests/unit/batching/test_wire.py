import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dapo_megatron.batching.batch import MicroBatch, MiniBatch, StepBatch
from dapo_megatron.batching.wire import decode, decode_step_batch, encode
from dapo_megatron.errors import DapoError

DTYPES = {
    "tokens": np.int64,
    "labels": np.int64,
    "position_ids": np.int64,
    "cu_seqlens": np.int32,
    "weights": np.float32,
    "advantages": np.float32,
    "rollout_logprobs": np.float32,
    "active": np.bool_,
}

micro_batches = st.builds(
    MicroBatch,
    sequences=st.lists(st.tuples(st.text(), st.integers(0, 99)), max_size=3),
    real_tokens=st.integers(0, 2**31),
    **{name: hnp.arrays(dtype, st.integers(0, 9)) for name, dtype in DTYPES.items()},
)
step_batches = st.builds(
    StepBatch,
    step=st.integers(0, 2**40),
    version=st.integers(0, 2**40),
    mini_batches=st.lists(
        st.builds(MiniBatch, shards=st.lists(st.lists(micro_batches, max_size=2), max_size=2)), max_size=2
    ),
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False)),
)


def assert_same(a, b):
    """Equal to the bit: NaN payloads and signed zeros count."""
    assert a.sequences == b.sequences
    for name in DTYPES:
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes()
        assert right.flags.writeable


@settings(deadline=None)
@given(step_batches)
def test_round_trip_is_exact(batch):
    back = decode_step_batch(encode(batch))

    assert (back.step, back.version, back.metrics) == (batch.step, batch.version, batch.metrics)
    assert [[len(s) for s in m.shards] for m in back.mini_batches] == [
        [len(s) for s in m.shards] for m in batch.mini_batches
    ]
    flat = [[mb for m in b.mini_batches for s in m.shards for mb in s] for b in (batch, back)]
    for a, b in zip(*flat, strict=True):
        assert_same(a, b)


@settings(deadline=None)
@given(st.lists(micro_batches, max_size=3))
def test_a_shard_travels_alone(shard):
    for a, b in zip(shard, decode(encode(shard), list[MicroBatch]), strict=True):
        assert_same(a, b)


def test_another_schema_is_refused_before_anything_else_is_read():
    with pytest.raises(DapoError, match="schema 99, this program reads 2"):
        decode_step_batch(msgspec.msgpack.encode({"schema": 99, "mini_batches": "changed"}))


@pytest.mark.parametrize("data", [b"", b"nonsense", msgspec.msgpack.encode([1, 2])])
def test_foreign_bytes_are_refused(data):
    with pytest.raises(DapoError, match="bytes are not a"):
        decode_step_batch(data)


@pytest.mark.parametrize("array", [("|O", b"12345678"), ("no type", b""), ("<i8", b"123")])
def test_a_bad_array_is_refused(array):
    good = encode(StepBatch(step=0, version=0, mini_batches=[], metrics={}))
    tree = msgspec.msgpack.decode(good)
    names = dict.fromkeys(DTYPES, array)
    tree["mini_batches"] = [{"shards": [[{**names, "sequences": []}]]}]
    with pytest.raises(DapoError):
        decode_step_batch(msgspec.msgpack.encode(tree))


def test_only_one_dimensional_arrays_are_encoded():
    with pytest.raises(NotImplementedError):
        encode(np.zeros((2, 2)))
