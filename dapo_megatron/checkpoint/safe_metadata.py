"""torch DCP's `.metadata` is a pickle: read with nothing but the classes that it needs."""

import io
import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from dapo_megatron.errors import DapoError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch": {
        "Size",
        "device",
        "dtype",
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "int64",
        "int32",
        "uint8",
        "bool",
    },
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_metadata(path: Path) -> Metadata:
    """The metadata of a distributed checkpoint.

    Raises:
        DapoError: it is missing, damaged, or asks for anything but descriptions of tensors.
    """
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        pickle.UnpicklingError,
    ) as e:
        raise DapoError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}): use another checkpoint") from None
    if not isinstance(metadata, Metadata):
        raise DapoError(f"{path} holds a {type(metadata).__name__}: use another checkpoint")
    return metadata
