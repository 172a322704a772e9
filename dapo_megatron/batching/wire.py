"""Batches as bytes: msgpack, with an array as (dtype, raw bytes). The round trip is exact."""

from typing import Any, TypeVar

import msgspec
import numpy as np

from dapo_megatron.batching.batch import SCHEMA, StepBatch
from dapo_megatron.errors import DapoError

T = TypeVar("T")


class _Header(msgspec.Struct):
    schema: int


def encode(obj: Any) -> bytes:
    """Encode a batch, a part of one, or anything msgspec knows that holds one-dimensional numpy arrays."""
    return msgspec.msgpack.encode(obj, enc_hook=_encode_array)


def decode(data: bytes, kind: type[T]) -> T:
    """Decode what `encode` made of an object of type `kind` (`list[MicroBatch]`, for example).

    Raises:
        DapoError: the bytes are truncated or hold something else.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_decode_array)
    except msgspec.DecodeError as e:
        raise DapoError(f"{len(data)} bytes are not a {kind.__name__}: {e}") from None


def decode_step_batch(data: bytes) -> StepBatch:
    """Decode a step's batch, from the controller or from a dump.

    Raises:
        DapoError: not a step batch, or one of another schema version.
    """
    schema = decode(data, _Header).schema
    if schema != SCHEMA:
        raise DapoError(
            f"the step batch has schema {schema}, this program reads {SCHEMA}: use the version that wrote it"
        )
    return decode(data, StepBatch)


def _encode_array(obj: Any) -> tuple[str, bytes]:
    if isinstance(obj, np.ndarray) and obj.ndim == 1:
        return obj.dtype.str, obj.tobytes()
    raise NotImplementedError(f"{type(obj).__name__} cannot be encoded")


def _decode_array(kind: type, obj: Any) -> np.ndarray:
    if kind is not np.ndarray:
        raise NotImplementedError(f"{kind.__name__} cannot be decoded")
    dtype, raw = msgspec.convert(obj, tuple[str, bytes])
    # A copy, because torch refuses memory it may not write to.
    return np.frombuffer(raw, np.dtype(dtype)).copy()
