"""Pickles in a distributed checkpoint, read without running what somebody else put there.

torch's reader unpickles `.metadata`, and the objects beside tensors (torch.distributed.checkpoint filesystem.py,
default_planner.py load_bytes). Both are read here first: `.metadata` by an unpickler that knows only torch's own
classes of metadata, the objects with weights_only.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from dapo_megatron.errors import StorageError

METADATA = ".metadata"
COMMON = "common.pt"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}
_READING = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)
"""What a damaged pickle may raise."""
_UNMERGED = ("Cannot merge two lists", "Duplicate non-dict and non-list values")
"""How megatron-core begins when two parts of a state have different values in one place (dict_utils.py, merge)."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place there")


def read_metadata(path: Path) -> Metadata:
    """The metadata of the distributed checkpoint in the folder `path`.

    Raises:
        StorageError: it is missing or damaged, or names anything but torch's classes of metadata, or files elsewhere.
    """
    return _read(path / METADATA, lambda data: _checked(_Unpickler(io.BytesIO(data)).load()))


def check_objects(path: Path) -> Metadata:
    """Read everything that torch and megatron-core would unpickle in the folder `path`; tensors are left alone.

    Raises:
        StorageError: the metadata or an object is missing or damaged, or holds more than plain data and tensors, or the
            pieces of a tensor leave gaps: torch would leave there what was before the load.
    """
    metadata = read_metadata(path)
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and sum(prod(c.sizes) for c in entry.chunks) != prod(entry.size):
            raise StorageError(f"{path / METADATA} is damaged: the pieces of {name} leave gaps or overlap")
    _read(path / COMMON, _load_object)
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            _read(path / info.relative_path, _load_object, info.offset, info.length)
    return metadata


def check_common(path: Path, format: str) -> None:
    """Raise StorageError unless what all ranks share, in the folder `path`, is that of a checkpoint of this format."""
    found = _read(path / COMMON, _load_object)
    optimizer, schedule = (found.get(n) if isinstance(found, dict) else None for n in ("optimizer", "schedule"))
    if not isinstance(optimizer, dict) or not isinstance(schedule, dict):
        raise StorageError(f"{path / COMMON} holds no state of optimizer and schedule: take another checkpoint")
    kind = "param_state_sharding_type"
    parts = [optimizer] if kind in optimizer else list(optimizer.values())
    if not parts or any(not isinstance(part, dict) or part.get(kind) != format for part in parts):
        raise StorageError(f"{path / COMMON} is not of the manifest's format {format}: take another checkpoint")


@contextmanager
def metadata_fits(path: Path, wanted: str) -> Iterator[None]:
    """What torch's reader finds wrong with the folder `path` in this block, in one line.

    Args:
        wanted: is read, for the error: "a checkpoint of the format weights".

    Raises:
        StorageError: its metadata has other tensors than those that are wanted, or other places than the files; or the
            disk does not give them.
    """
    try:
        yield
    except CheckpointException as e:  # of all ranks that failed, a traceback each
        error = next(iter(e.failures.values()))[0]
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise StorageError(f"{path} cannot be read: {reason}") from None
        raise StorageError(f"{path / METADATA} does not fit {wanted}: {reason}") from None


@contextmanager
def common_fits(path: Path) -> Iterator[None]:
    """What megatron-core finds wrong with what all ranks share, in the folder `path`, in this block, in one line.

    Raises:
        StorageError: it has something in the place of a tensor or of an object.
    """
    try:
        yield
    except ValueError as e:
        if not str(e).startswith(_UNMERGED):
            raise
        reason = " ".join(str(e).split())[:200]
        raise StorageError(f"{path / COMMON} does not fit {path / METADATA}: {reason}") from None


def _load_object(data: bytes) -> Any:
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _read(file: Path, load: Callable[[bytes], Any], start: int = 0, length: int = -1) -> Any:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return load(stream.read(length))
    except OSError as e:
        raise StorageError(f"{file} cannot be read ({e.strerror})") from None
    except (*_READING, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise StorageError(f"{file} is damaged or hostile: {reason}") from None


def _checked(metadata: Any) -> Metadata:
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    if not _maps(entries, str, TensorStorageMetadata | BytesStorageMetadata):
        raise pickle.UnpicklingError("it does not say which tensors there are")
    if not _maps(places, MetadataIndex, _StorageInfo):
        raise pickle.UnpicklingError("it does not say where the tensors lie")
    for index, info in places.items():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise pickle.UnpicklingError(f"{index.fqn} lies in {name}, outside the checkpoint")
    return metadata


def _maps(found: Any, keys: Any, values: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(k, keys) and isinstance(v, values) for k, v in found.items())
