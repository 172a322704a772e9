"""Arrays in messages: they come back bit for bit, in MessagePack and in JSON, and what is none is refused."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dapo_megatron.arrays import decode_array, encode_array

arrays = st.sampled_from([np.bool_, np.int32, np.int64, np.uint8, np.float32, np.float64]).flatmap(
    lambda dtype: hnp.arrays(dtype, st.integers(0, 20))
)
CODECS = [msgspec.msgpack, msgspec.json]


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(array=arrays, step=st.sampled_from([1, 2, -1]))
def test_the_round_trip_is_exact(codec, array, step):
    array = array[::step]
    back = codec.decode(codec.encode(array, enc_hook=encode_array), type=np.ndarray, dec_hook=decode_array)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert not back.flags.writeable


def test_truth_values_are_bits():
    mask = np.arange(4001) % 3 == 0
    assert len(msgspec.msgpack.encode(mask, enc_hook=encode_array)) < 4001 // 8 + 20


@pytest.mark.parametrize(
    "bad",
    [("|O", 1, b"12345678"), ("no type", 0, b""), ("<i8", 1, b"123"), ("<i4", 2, b"1234"), ("|b1", 9, b"1"), 5]
    + [
        ("<M8[s]", 1, b"12345678"),
        ("<i4", 0, b"1234"),
        ("|b1", -9, b""),
        ("<\x1f4", 1, b"1234"),
        ("<i4,<i4", 1, b"12345678"),
    ],
)
def test_what_is_no_array_is_refused(bad):
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(bad), type=np.ndarray, dec_hook=decode_array)


@pytest.mark.parametrize("obj", [np.zeros((2, 2)), np.array(["a"]), np.array([None]), {1: 2}.keys()])
def test_only_numbers_in_one_dimension_are_encoded(obj):
    with pytest.raises(NotImplementedError):
        msgspec.msgpack.encode(obj, enc_hook=encode_array)
