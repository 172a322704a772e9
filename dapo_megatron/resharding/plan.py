"""Which tensors go out together: the buckets of one weight push. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Bucket:
    """Whole Hugging Face tensors that travel in one collective, one behind the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size on the wire."""
        return sum(prod(s) for s in self.shapes) * ITEM_BYTES[self.dtype]


def plan_buckets(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: str, bucket_bytes: int) -> list[Bucket]:
    """Cut a sequence of (name, shape) into buckets of at most bucket_bytes; a larger tensor stands alone.

    The order is kept, so that the sender never holds more than one bucket and one gathered parameter.
    """
    buckets: list[Bucket] = []
    current: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for name, shape in tensors:
        n = prod(shape) * ITEM_BYTES[dtype]
        if current and size + n > bucket_bytes:
            buckets.append(_bucket(current, dtype))
            current, size = [], 0
        current.append((name, shape))
        size += n
    if current:
        buckets.append(_bucket(current, dtype))
    return buckets


def _bucket(tensors: list[tuple[str, tuple[int, ...]]], dtype: str) -> Bucket:
    return Bucket(tuple(name for name, _ in tensors), tuple(shape for _, shape in tensors), dtype)
