"""What is in a checkpoint, and where two of them differ; one tensor in memory at a time, in one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dapo_megatron.checkpoint.integrity import intact_manifest
from dapo_megatron.checkpoint.manifest import MODEL
from dapo_megatron.checkpoint.safe_metadata import check_objects, metadata_fits, read_metadata

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a distributed checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: int
    """Pieces that it is stored in."""

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def stored_tensors(checkpoint: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint, by name."""
    metadata = read_metadata(checkpoint / MODEL)
    return [
        StoredTensor(name, tuple(entry.size), entry.properties.dtype, len(entry.chunks))
        for name, entry in sorted(metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata)
    ]


def differences(a: Path, b: Path) -> Iterator[str]:
    """A line for every tensor that is in one checkpoint alone, or not the same in both, bit for bit.

    Raises:
        StorageError: one of them is damaged.
    """
    for path in (a, b):
        intact_manifest(path)
        check_objects(path / MODEL)
    left, right = ({t.name: t for t in stored_tensors(path)} for path in (a, b))
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            yield f"{name}: only in {a}"
        elif name not in left:
            yield f"{name}: only in {b}"
        elif (left[name].shape, left[name].dtype) != (right[name].shape, right[name].dtype):
            yield f"{name}: {_kind(left[name])} and {_kind(right[name])}"
        elif line := _compare(_tensor(a, left[name]), _tensor(b, right[name])):
            yield f"{name}: {line}"


def _kind(tensor: StoredTensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _tensor(checkpoint: Path, stored: StoredTensor) -> torch.Tensor:
    state = {stored.name: torch.empty(stored.shape, dtype=stored.dtype)}
    folder = checkpoint / MODEL
    with metadata_fits(folder, stored.name):
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)  # type: ignore[attr-defined]
    return state[stored.name]


def _compare(a: torch.Tensor, b: torch.Tensor) -> str:
    bits = _BITS[a.element_size()]
    other = a.view(bits) != b.view(bits)
    if not other.any():
        return ""
    largest = float((a.double() - b.double()).abs().nan_to_num(float("inf")).max())
    return f"{int(other.sum())} of {a.numel()} elements differ, by up to {largest:.3g}"
