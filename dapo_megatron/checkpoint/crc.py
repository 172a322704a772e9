"""torch's CRC-32 of what it saves is left out where every file has an XXH3 hash: it takes longer than the writing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_crc() -> Iterator[None]:
    """torch neither computes nor checks CRC-32 in this block (a setting of the whole process)."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
