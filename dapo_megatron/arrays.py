"""One-dimensional numpy arrays in messages and files: (dtype, entries, bytes), truth values as bits. Exact.

Give `encode_array` to msgspec as enc_hook and `decode_array` as dec_hook.
"""

import re
from typing import Any

import msgspec
import numpy as np

_DTYPE = re.compile(r"[<>|][biuf]\d{1,2}")
"""What numpy.dtype.str is."""


def encode_array(obj: Any) -> tuple[str, int, memoryview]:
    """What stands for an array in MessagePack or JSON (there, the bytes are base64).

    Raises:
        NotImplementedError: it is no array, or not one of numbers or truth values in one dimension.
    """
    if isinstance(obj, np.ndarray) and obj.ndim == 1 and obj.dtype.kind in "biuf":
        held = np.packbits(obj) if obj.dtype.kind == "b" else np.ascontiguousarray(obj)
        return obj.dtype.str, obj.size, held.data
    raise NotImplementedError(f"{type(obj).__name__} cannot be encoded")


def decode_array(kind: type, obj: Any) -> np.ndarray:
    """The array again; it may not be written to.

    Raises:
        NotImplementedError: `kind` is not numpy.ndarray.
        ValueError, TypeError: no array; msgspec makes a ValidationError of it that says where.
    """
    if kind is not np.ndarray:
        raise NotImplementedError(f"{kind.__name__} cannot be decoded")
    name, size, raw = msgspec.convert(obj, tuple[str, int, bytes])
    if not _DTYPE.fullmatch(name):  # numpy reads more than names, and raises what it likes
        raise ValueError(f"{name!r} is no type of numbers or truth values")
    dtype = np.dtype(name)
    if dtype.kind == "b":
        bits = np.frombuffer(raw, np.uint8)
        if bits.size != -(-size // 8):
            raise ValueError(f"{len(raw)} bytes for {size} truth values")
        array = np.unpackbits(bits, count=size).view(np.bool_)
        array.flags.writeable = False
        return array
    array = np.frombuffer(raw, dtype)
    if array.size != size or dtype.kind not in "iuf":
        raise ValueError(f"{len(raw)} bytes for {size} entries of {name}")
    return array
