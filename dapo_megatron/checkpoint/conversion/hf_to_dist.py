"""A Hugging Face folder -> a distributed checkpoint of the weights, in one process, a tensor in memory at a time.

OUT/
    model/         megatron-core distributed checkpoint, loadable under any layout
    hf/            configuration, tokenizer and the other files of the source that are no weights
    layout.json    {file: safetensors header} of the source: which tensor is in which of its files
    manifest.json  as of every checkpoint

A key of the model folder is stored as one or more chunks; one chunk is read, changed and written at a time.
"""

import io
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dapo_megatron.checkpoint.conversion import output
from dapo_megatron.checkpoint.conversion.lazy_writer import write_lazily
from dapo_megatron.checkpoint.conversion.output import Aside
from dapo_megatron.checkpoint.conversion.stored_keys import Place, account, object_keys, places
from dapo_megatron.checkpoint.integrity import files_in, record_of
from dapo_megatron.checkpoint.manifest import (
    HF,
    MANIFEST,
    MODEL,
    FileRecord,
    Manifest,
    encode_manifest,
    libraries,
    model_numbers,
)
from dapo_megatron.checkpoint.safe_metadata import COMMON
from dapo_megatron.checkpoint.store import copy_files, sync_folder, write_synced
from dapo_megatron.observe.progress import progress
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import INDEX, HfFolder, check_weights, side_files
from dapo_megatron.weights.hf_writer import cast, index_text, parse_header, relaid, source_layout
from dapo_megatron.weights.table import ParameterMapping, hf_names, row_ranges, to_shard

PART_BYTES = 2**30
"""Of one file of the checkpoint."""
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json of megatron-core 0.16.1 (dist_checkpointing/core.py), whose import would take seconds."""
CHUNK_BYTES = 2**24
"""What is read and written at a time. The C library gives blocks of up to 32 MB the same memory again and again."""


def convert_hf_to_dist(source: Path, out: Path, dtype: torch.dtype | None, console: Console) -> int:
    """Convert and publish `out`; goes on where an interrupted call with the same arguments was.

    Args:
        dtype: type of all weights; None keeps each as it is.

    Returns:
        Bytes of weights that were converted.

    Raises:
        DapoError: the source is not supported, damaged or incomplete, or `out` cannot be made.
    """
    output.require_outside(out, source)
    shape, folder = read_model(source), HfFolder(source)
    check_weights(folder, shape)
    before = source_layout(folder)
    kept = hf_names(shape) | ({"lm_head.weight"} & folder.files.keys())
    own = {name: entry.dtype for header in before.values() for name, entry in parse_header(header).items()}
    types = {name: dtype or own[name] for name in kept}
    layout = {file: relaid(header, types) for file, header in before.items() if kept & parse_header(header).keys()}
    chunks = _chunks(shape, types)
    sides = side_files(source)
    inputs = output.stamps(source, [*sides, *layout])
    with output.written_aside(out, inputs, {"dtype": _name(dtype), "to": "dist"}) as aside:
        _write_model(aside, folder, shape, chunks, console)
        copy_files(source, sides, aside.path / HF)
        if layout != before and INDEX in sides:
            write_synced(aside.path / HF / INDEX, index_text(layout).encode())
        if dtype is not None:
            output.set_config_dtype(aside.path / HF / "config.json", dtype)
        write_synced(aside.path / output.LAYOUT, msgspec.json.encode(layout))
        _write_manifest(aside, shape, set(types.values()))
    return sum(chunk.size for chunk in chunks)


@dataclass(frozen=True)
class _Chunk:
    """What is read and written at once: rows of one Hugging Face tensor, or q, k and v of one layer."""

    mapping: ParameterMapping
    place: Place
    dtype: torch.dtype
    row: int
    """Of the parameter, the first."""
    shape: tuple[int, ...]
    source: tuple[str, int] | None
    """Hugging Face tensor, and its first row; None: all of the parameter's tensors."""

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def offsets(self) -> tuple[int, ...]:
        return (*self.place.index, self.row, *(0 for _ in self.shape[1:]))

    @property
    def item(self) -> WriteItem:
        data = TensorWriteData(
            ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self._stacked)),
            TensorProperties(dtype=self.dtype),
            torch.Size(self.place.stored_shape),
        )
        return WriteItem(MetadataIndex(self.place.key, self.offsets), WriteItemType.SHARD, tensor_data=data)

    def read(self, folder: HfFolder, shape: ModelShape) -> torch.Tensor:
        if self.source is not None:
            name, first = self.source
            whole = cast(name, folder.rows(name, first, first + self.shape[0]), self.dtype)
        else:
            tensors = [cast(name, folder.tensor(name), self.dtype) for name in self.mapping.hf]
            whole = to_shard(self.mapping, shape, tensors, 1, 0)
        return whole.reshape(self._stacked)

    @property
    def _stacked(self) -> tuple[int, ...]:
        return (1,) * len(self.place.index) + self.shape


def _chunks(shape: ModelShape, types: dict[str, torch.dtype]) -> list[_Chunk]:
    """All that is stored, one tensor after the other: torch's writer keeps the last chunk of each tensor of a file."""
    table = sorted(places(shape), key=lambda pair: (pair[1].key, pair[1].index))
    account(table, shape)
    # A stored tensor has one type: that which holds all of its layers' without loss.
    stored: dict[str, torch.dtype] = {}
    for mapping, place in table:
        for name in mapping.hf:
            stored[place.key] = torch.promote_types(stored.get(place.key, types[name]), types[name])
    out = []
    for mapping, place in table:
        dtype, tail = stored[place.key], place.shape[1:]
        if mapping.kind == "qkv":
            out.append(_Chunk(mapping, place, dtype, 0, place.shape, None))
        step = max(1, CHUNK_BYTES // (prod(tail) * dtype.itemsize))
        for name, first, end in row_ranges(mapping, shape):
            for row in range(first, end, step):
                rows = min(step, end - row)
                out.append(_Chunk(mapping, place, dtype, row, (rows, *tail), (name, row - first)))
    return out


def _write_model(aside: Aside, folder: HfFolder, shape: ModelShape, chunks: list[_Chunk], console: Console) -> None:
    path = aside.path / MODEL
    path.mkdir(exist_ok=True)
    done = {(p.key, p.offsets) for part in aside.journal.done.values() for p in part.pieces}
    left = [chunk for chunk in chunks if (chunk.place.key, chunk.offsets) not in done]
    total, needed = sum(chunk.size for chunk in chunks), sum(chunk.size for chunk in left)
    output.require_room(path, needed)
    tensors = output.one_ahead((chunk, chunk.read(folder, shape)) for chunk in left)
    with progress("converting", total, console, total - needed) as advance, closing(tensors):

        def read(index: MetadataIndex) -> torch.Tensor:
            chunk, tensor = next(tensors)
            assert (index.fqn, tuple(index.offset or ())) == (chunk.place.key, chunk.offsets)
            advance(chunk.size)
            return tensor

        write_lazily(aside, path, _parts(chunks, shape), read)
    common = io.BytesIO()
    torch.save({}, common)
    write_synced(path / COMMON, common.getvalue())
    write_synced(path / "metadata.json", msgspec.json.encode(BACKENDS))
    sync_folder(path)


def _parts(chunks: list[_Chunk], shape: ModelShape) -> list[list[WriteItem]]:
    """The items of each file."""
    parts: list[list[WriteItem]] = [
        [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in object_keys(shape)]
    ]
    filled = 0
    for chunk in chunks:
        if filled and filled + chunk.size > PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(chunk.item)
        filled += chunk.size
    return parts


def _write_manifest(aside: Aside, shape: ModelShape, types: set[torch.dtype]) -> None:
    files = {}
    parts = {f"{MODEL}/{name}": part for name, part in aside.journal.done.items()}
    for name in sorted(files_in(aside.path)):
        part = parts.get(name)
        files[name] = FileRecord(part.size, part.xxh3) if part else record_of(aside.path / name)
    manifest = Manifest(
        format="weights",
        model=model_numbers(shape),
        dtype=_name(next(iter(types))) if len(types) == 1 else "mixed",
        files=files,
        libraries=libraries(),
    )
    write_synced(aside.path / MANIFEST, encode_manifest(manifest))


def _name(dtype: torch.dtype | None) -> str:
    return "as in the source" if dtype is None else str(dtype).removeprefix("torch.")
