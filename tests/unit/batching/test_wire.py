"""A batch in parts: every sequence comes back bit for bit, in its place; what is cut short or foreign is refused."""

import dataclasses
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.batching.batch import MiniBatch, StepBatch
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.batching.wire import (
    Place,
    cut,
    decode_part,
    encode_part,
    read_step_batch,
    require_tokens,
    write_parts,
)
from dapo_megatron.errors import DapoError
from dapo_megatron.rollout.served import ServedBatch

PLACE = Place(step=3, version=2, update=0, updates=1, replica=0, replicas=1, part=0, parts=1)


@st.composite
def samples(draw):
    n, prompt = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    return TrainingSample(
        token_ids=np.array(
            draw(st.lists(st.integers(0, 2**31 - 1), min_size=n + prompt, max_size=n + prompt)), np.int32
        ),
        prompt_length=prompt,
        loss_mask=np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))),
        logprobs=np.array(draw(st.lists(st.floats(width=32), min_size=n, max_size=n)), np.float32),
        advantage=draw(st.floats()),
        weight=draw(st.floats(0, 1)),
        source=(draw(st.text()), draw(st.integers(0, 99))),
    )


shards = st.lists(st.lists(samples(), max_size=3), min_size=1, max_size=4)


@st.composite
def step_batches(draw):
    replicas = draw(st.integers(1, 3))
    mini_batches = st.builds(MiniBatch, shards=st.lists(shards, min_size=replicas, max_size=replicas))
    updates = draw(st.lists(mini_batches, min_size=1, max_size=3))
    return StepBatch(draw(st.integers(0, 2**40)), draw(st.integers(0, 2**40)), updates)


def bits(shard):
    """All of a shard, floats as their bytes: NaN payloads and signed zeros count."""

    def of(value):
        if isinstance(value, np.ndarray):
            return value.dtype, value.tobytes()
        return struct.pack("d", value) if isinstance(value, float) else value

    return [[[of(getattr(s, f.name)) for f in dataclasses.fields(s)] for s in micro_batch] for micro_batch in shard]


@settings(deadline=None)
@given(shards)
def test_the_round_trip_is_exact(shard):
    place, back = decode_part(encode_part(PLACE, shard))
    assert place == PLACE and bits(back) == bits(shard)


@settings(deadline=None)
@given(shards, st.integers(1, 60))
def test_parts_hold_whole_micro_batches_in_order_within_the_limit(shard, limit):
    parts = cut(shard, limit)
    assert [micro_batch for part in parts for micro_batch in part] == shard and all(parts)
    tokens = [[sum(s.length for s in micro_batch) for micro_batch in part] for part in parts]
    assert all(sum(own) <= limit or len(own) == 1 for own in tokens)
    assert all(sum(own) + after[0] > limit for own, after in zip(tokens, tokens[1:], strict=False))


@settings(deadline=None)
@given(step_batches(), st.integers(1, 60))
def test_a_file_of_parts_is_the_batch(tmp_path_factory, batch, limit):
    path = tmp_path_factory.mktemp("batch") / "batches" / "step.msgpack"
    served = ServedBatch(batch, part_tokens=limit)
    write_parts(path, [b"of an earlier run"])
    write_parts(path, served.all_encoded())
    back = read_step_batch(path)
    assert (back.step, back.version) == (batch.step, batch.version)
    assert [[bits(s) for s in m.shards] for m in back.mini_batches] == [
        [bits(s) for s in m.shards] for m in batch.mini_batches
    ]
    whole = path.read_bytes()
    ends = {0}
    for part in served.all_encoded():
        ends.add(max(ends) + 16 + len(part))
    for end in sorted({*ends, *(e - 1 for e in ends if e), *(e + 3 for e in ends)} - {len(whole), len(whole) + 3}):
        path.write_bytes(whole[:end])
        with pytest.raises(DapoError, match="cut short|holds no part|is damaged"):
            read_step_batch(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "old.msgpack"
    for data in (b"", msgspec.msgpack.encode({"schema": 2, "step": 1, "mini_batches": []}), b"\xff" * 8, b"\0" * 8):
        path.write_bytes(data)
        with pytest.raises(DapoError, match=r"old.msgpack (is damaged|holds no part of a batch)"):
            read_step_batch(path)


def parts_of_a_step(step=3):
    """Two updates of two replicas, each of two parts."""
    batch = StepBatch(step, 2, [MiniBatch([[[sample(1)], [sample(2)]], [[sample(3)], [sample(4)]]]) for _ in range(2)])
    return list(ServedBatch(batch, part_tokens=1).all_encoded())


def sample(number, mask=(True, False)):
    ids, mask = np.arange(3, dtype=np.int32), np.array(mask)
    return TrainingSample(ids, 1, mask, np.zeros(2, np.float32), 0.5, 0.1, ("p", number))


def test_parts_may_stand_in_any_order_and_none_may_be_of_another_batch_or_there_twice(tmp_path):
    path, parts = tmp_path / "step_000003.msgpack", parts_of_a_step()
    write_parts(path, reversed(parts))
    sources = [[s.source[1] for m in shard for s in m] for shard in read_step_batch(path).mini_batches[1].shards]
    assert sources == [[1, 2], [3, 4]]
    beyond = encode_part(msgspec.structs.replace(decode_part(parts[0])[0], update=7), [[sample(1)]])
    for foreign, says in [
        ([*parts[:-1], parts_of_a_step(4)[-1]], "parts of different batches"),
        ([parts[0], parts[0], *parts[2:]], "part 0 of update 0, replica 0 twice"),
        ([*parts, beyond], "a part that no batch of 2 updates has"),
    ]:
        write_parts(path, foreign)
        with pytest.raises(DapoError, match=says) as e:
            read_step_batch(path)
        assert str(path) in str(e.value)


def test_a_damaged_part_is_refused_with_the_name_of_its_file(tmp_path):
    path, (first, *rest) = tmp_path / "step_000003.msgpack", parts_of_a_step()
    short = encode_part(decode_part(first)[0], [[sample(1, mask=[True])]])
    text = first.replace(b"\xa1p", b"\xa1\xff")  # no UTF-8
    no_prompt = TrainingSample(np.arange(2, dtype=np.int32), 0, [True] * 2, [-1.0] * 2, 0.5, 0.1, ("p", 1))
    for damaged in (short, text, encode_part(decode_part(first)[0], [[no_prompt]])):
        assert damaged != first
        write_parts(path, [damaged, *rest])
        with pytest.raises(DapoError, match=r"step_000003.msgpack, part 0: "):
            read_step_batch(path)


def test_a_flipped_bit_anywhere_is_refused_with_the_name_of_the_file(tmp_path):
    path = tmp_path / "step_000003.msgpack"
    write_parts(path, parts_of_a_step())
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(DapoError, match=r"_000003.msgpack is damaged, or older .*: part \d has not the hash") as e:
            read_step_batch(path)
        assert "\n" not in str(e.value)


def test_a_batch_of_a_larger_vocabulary_is_refused(tmp_path):
    path = tmp_path / "step_000003.msgpack"
    write_parts(path, parts_of_a_step())
    require_tokens(read_step_batch(path), 3, path)
    with pytest.raises(DapoError, match=r"step_000003.msgpack has token 2, the model has 2: "):
        require_tokens(read_step_batch(path), 2, path)


def test_a_token_takes_eight_bytes_and_its_mask_a_bit():
    n = 100_000
    ids, mask, logprobs = np.arange(n, dtype=np.int32), np.ones(n - 9, np.bool_), np.zeros(n - 9, np.float32)
    sample = TrainingSample(ids, 9, mask, logprobs, 0.5, 0.1, ("p", 0))
    assert 8 * n < len(encode_part(PLACE, [[sample]])) < 8.13 * n


def test_lists_travel_as_arrays():
    _, (((back,),)) = decode_part(encode_part(PLACE, [[TrainingSample([1, 2], 1, [True], [-0.5], 0.5, 0.1, ("p", 0))]]))
    assert (back.token_ids.dtype, back.loss_mask.dtype, back.logprobs.dtype) == (np.int32, np.bool_, np.float32)


def test_another_schema_is_refused_before_anything_else_is_read():
    with pytest.raises(DapoError, match="schema 99, this program reads 4"):
        decode_part(msgspec.msgpack.encode({"schema": 99, "micro_batches": "changed"}))


@pytest.mark.parametrize("data", [b"", b"nonsense", msgspec.msgpack.encode([1, 2]), encode_part(PLACE, [[]])[:-1]])
def test_foreign_bytes_are_refused(data):
    with pytest.raises(DapoError, match="bytes are no part of a batch"):
        decode_part(data)
