"""Writing safetensors files tensor by tensor, in any order, and the layout of a Hugging Face folder.

safetensors.torch.save_file wants a whole file in memory. The format is simple (huggingface/safetensors, README): the
length of the header in 8 bytes, the header in JSON (name -> dtype, shape, data_offsets), then the tensors' bytes. So
the header is written first and every tensor at its place. A header kept from the source gives its very bytes again.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

from dapo_megatron.errors import DapoError
from dapo_megatron.weights.hf_folder import SINGLE, HfFolder

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_FILE_BYTES = 5 * 10**9
"""Of one file where the source does not say: transformers' usual size."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Of its bytes, after the header."""

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> str:
    """The JSON header of a safetensors file that safetensors itself can read.

    Raises:
        DapoError: a tensor is named twice.
    """
    with path.open("rb") as f:
        text = f.read(int.from_bytes(f.read(8), "little")).decode("utf-8")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
            raise DapoError(f"{path} has {sorted(twice)[0]} twice: download the checkpoint again")
        return dict(pairs)

    json.loads(text, object_pairs_hook=once)
    return text


def parse_header(text: str) -> dict[str, TensorEntry]:
    """The tensors of a header, in the order of their bytes.

    Raises:
        DapoError: one has a type that needs scales.
    """
    tree = json.loads(text)
    tree.pop("__metadata__", None)
    for name, tensor in tree.items():
        if tensor["dtype"] not in DTYPES:
            raise DapoError(f"{name} has type {tensor['dtype']}: give weights in bfloat16, float16 or float32")
    entries = {n: TensorEntry(DTYPES[t["dtype"]], tuple(t["shape"]), t["data_offsets"][0]) for n, t in tree.items()}
    return dict(sorted(entries.items(), key=lambda pair: pair[1].begin))


def make_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """A header for tensors in this order, padded so that their bytes start at a multiple of 8."""
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + prod(shape) * dtype.itemsize
        tree[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def relaid(header: str, types: Mapping[str, torch.dtype]) -> str:
    """The header with these tensors only, each in the type given; the same text where that changes nothing."""
    before = {name: (entry.dtype, entry.shape) for name, entry in parse_header(header).items()}
    after = {name: (types[name], shape) for name, (_, shape) in before.items() if name in types}
    return header if before == after else make_header(after, json.loads(header).get("__metadata__", {}))


def source_layout(folder: HfFolder) -> dict[str, str]:
    """{file: header} of a folder's weights."""
    return {file: read_header(folder.path / file) for file in sorted(set(folder.files.values()))}


def plain_layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, str]:
    """{file: header} as transformers would write it: one file, or several of up to MAX_FILE_BYTES with numbers."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > MAX_FILE_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = (dtype, shape)
        filled += size
    n = len(groups)
    names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    return {name: make_header(group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)}


def index_text(layout: Mapping[str, str]) -> str:
    """model.safetensors.index.json of a layout."""
    files = {file: parse_header(header) for file, header in layout.items()}
    entries = [entry for tensors in files.values() for entry in tensors.values()]
    sizes = {"total_parameters": sum(prod(e.shape) for e in entries), "total_size": sum(e.size for e in entries)}
    places = {name: file for file, tensors in files.items() for name in tensors}
    return json.dumps({"metadata": sizes, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another type.

    Raises:
        DapoError: a finite number of it would be infinite there.
    """
    found = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(found.isinf(), tensor.isinf()):
        raise DapoError(
            f"{name} has numbers that are too large for {str(dtype).removeprefix('torch.')}: choose another type"
        )
    return found


class HfWriter:
    """The safetensors files of a folder, filled tensor by tensor in any order; whole files are there from the start.

    Opening it again on files that an interrupted one left keeps what they hold.
    """

    def __init__(self, folder: Path, layout: Mapping[str, str]):
        self.entries: dict[str, TensorEntry] = {}
        self._handles: dict[str, int] = {}
        self._hashers: dict[str, xxhash.xxh3_128] = {}
        self._places: dict[str, tuple[int, int]] = {}  # tensor -> (handle, first byte)
        for file, header in layout.items():
            data = header.encode()
            start = 8 + len(data)
            handle = self._handles[file] = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            _pwrite(handle, len(data).to_bytes(8, "little") + data, 0)
            entries = parse_header(header)
            os.ftruncate(handle, start + sum(entry.size for entry in entries.values()))
            self.entries |= entries
            self._places |= {name: (handle, start + entry.begin) for name, entry in entries.items()}

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Write a tensor, or the rows of it from `row` on, in the type of its entry; rows come in order."""
        entry, (handle, start) = self.entries[name], self._places[name]
        assert tensor.shape[1:] == entry.shape[1:] and row + tensor.shape[0] <= entry.shape[0], name
        data = cast(name, tensor, entry.dtype).contiguous()
        view = data.view(-1).view(torch.uint8).numpy().data
        self._hashers.setdefault(name, xxhash.xxh3_128()).update(view)
        _pwrite(handle, view, start + row * prod(entry.shape[1:]) * entry.dtype.itemsize)

    def digest(self, name: str) -> str:
        """xxh3 of what was written of a tensor."""
        return str(self._hashers[name].hexdigest())

    def digest_on_disk(self, name: str) -> str:
        """xxh3 of the bytes of a tensor as they are in the file."""
        hasher, (handle, start), size = xxhash.xxh3_128(), self._places[name], self.entries[name].size
        for begin in range(0, size, _PIECE):
            hasher.update(os.pread(handle, min(_PIECE, size - begin), start + begin))
        return str(hasher.hexdigest())

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        for handle in self._handles.values():
            os.fsync(handle)

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles.values():
            os.close(handle)


_PIECE = 16 * 2**20


def _pwrite(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
