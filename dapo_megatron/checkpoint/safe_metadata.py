"""Pickles in a distributed checkpoint, read without running what somebody else put there.

torch's reader unpickles `.metadata`, and the objects beside tensors (torch.distributed.checkpoint filesystem.py,
default_planner.py load_bytes). Both are read here first: `.metadata` by an unpickler that knows only torch's own
classes of metadata, the objects with weights_only.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place there")


def read_metadata(path: Path) -> Metadata:
    """The metadata of the distributed checkpoint in the folder `path`.

    Raises:
        StorageError: it is missing or damaged, or names anything but torch's classes of metadata.
    """
    return _read(path / METADATA, lambda data: _checked(_Unpickler(io.BytesIO(data)).load()))


def check_objects(path: Path) -> Metadata:
    """Read everything that torch and megatron-core would unpickle in the folder `path`; tensors are left alone.

    Raises:
        StorageError: the metadata or an object is missing or damaged, or holds more than plain data and tensors.
    """
    metadata = read_metadata(path)
    _read(path / COMMON, _load_object)
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path:
            raise StorageError(f"{path / METADATA} is damaged or hostile: {index.fqn} lies in {info.relative_path}")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            _read(path / info.relative_path, _load_object, info.offset, info.length)
    return metadata


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
    return metadata
