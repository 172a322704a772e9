"""A Hugging Face folder -> a distributed checkpoint of the weights, in one process, a tensor in memory at a time.

OUT/
    model/         megatron-core distributed checkpoint, loadable under any layout
    hf/            configuration, tokenizer and the other files of the source that are no weights
    layout.json    {file: safetensors header} of the source: which tensor is in which of its files
    manifest.json  as of every checkpoint

torch's own FileSystemWriter writes it: each part of about 1 GB is to it one rank's plan, and the planner reads a tensor
when the writer asks for its bytes.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dapo_megatron.checkpoint import conversion
from dapo_megatron.checkpoint.conversion import Aside, Part, Piece
from dapo_megatron.checkpoint.integrity import files_in, record_of
from dapo_megatron.checkpoint.manifest import MANIFEST, FileRecord, Manifest, encode_manifest, libraries, model_numbers
from dapo_megatron.checkpoint.safe_metadata import COMMON
from dapo_megatron.checkpoint.store import HF, MODEL, sync_folder, write_synced
from dapo_megatron.checkpoint.stored_keys import Place, account, object_keys, places
from dapo_megatron.errors import DapoError, StorageError
from dapo_megatron.observe.progress import progress
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import INDEX, HfFolder, check_weights
from dapo_megatron.weights.hf_writer import index_text, parse_header, relaid, source_layout
from dapo_megatron.weights.table import ParameterMapping, hf_names, to_shard

PART_BYTES = 2**30
"""Of one file of the checkpoint."""
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json of megatron-core 0.16.1 (dist_checkpointing/core.py), whose import would take seconds."""
BLOCK_BYTES = 2**26
"""Rows of the embedding and of the output layer that are read at a time."""


def convert_hf_to_dist(source: Path, out: Path, dtype: torch.dtype | None, console: Console) -> int:
    """Convert and publish `out`; goes on where an interrupted call with the same arguments was.

    Args:
        dtype: type of all weights; None keeps each as it is.

    Returns:
        Bytes of weights that were converted.

    Raises:
        DapoError: the source is not supported, damaged or incomplete, or `out` cannot be made.
    """
    shape, folder = read_model(source), HfFolder(source)
    check_weights(folder, shape)
    before = source_layout(folder)
    kept = hf_names(shape) | ({"lm_head.weight"} & folder.files.keys())
    own = {name: entry.dtype for header in before.values() for name, entry in parse_header(header).items()}
    types = {name: dtype or own[name] for name in kept}
    layout = {file: relaid(header, types) for file, header in before.items()}
    chunks = _chunks(shape, types)
    sides = conversion.side_files(source)
    inputs = conversion.stamps(source, [*sides, *layout])
    with conversion.written_aside(out, inputs, {"dtype": _name(dtype), "to": "dist"}) as aside:
        _write_model(aside, folder, shape, chunks, console)
        conversion.copy_files(source, sides, aside.path / HF)
        if layout != before and len(layout) > 1:
            write_synced(aside.path / HF / INDEX, index_text(layout).encode())
        if dtype is not None:
            conversion.set_config_dtype(aside.path / HF / "config.json", dtype)
        write_synced(aside.path / conversion.LAYOUT, msgspec.json.encode(layout))
        _write_manifest(aside, shape, set(types.values()))
    return sum(chunk.size for chunk in chunks)


@dataclass(frozen=True)
class _Chunk:
    """What is written at once: a parameter, or some rows of one."""

    mapping: ParameterMapping
    place: Place
    dtype: torch.dtype
    row: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def item(self) -> WriteItem:
        ones = len(self.place.index)
        offsets = (*self.place.index, self.row, *(0 for _ in self.shape[1:]))
        data = TensorWriteData(
            ChunkStorageMetadata(torch.Size(offsets), torch.Size((1,) * ones + self.shape)),
            TensorProperties(dtype=self.dtype),
            torch.Size(self.place.stored_shape),
        )
        return WriteItem(MetadataIndex(self.place.key, offsets), WriteItemType.SHARD, tensor_data=data)

    def read(self, folder: HfFolder, shape: ModelShape) -> torch.Tensor:
        if self.mapping.kind == "rows":
            whole = folder.rows(self.mapping.hf[0], self.row, self.row + self.shape[0]).to(self.dtype)
        else:
            tensors = [folder.tensor(name).to(self.dtype) for name in self.mapping.hf]
            whole = to_shard(self.mapping, shape, tensors, 1, 0)
        return whole.reshape((1,) * len(self.place.index) + self.shape)


def _chunks(shape: ModelShape, types: dict[str, torch.dtype]) -> list[_Chunk]:
    """All of the checkpoint, one stored tensor after the other: torch's writer keeps the last chunk of each."""
    table = sorted(places(shape), key=lambda pair: (pair[1].key, pair[1].index))
    account(table, shape)
    # A stored tensor has one type: that which holds all of its layers' without loss.
    stored: dict[str, torch.dtype] = {}
    for mapping, place in table:
        for name in mapping.hf:
            stored[place.key] = torch.promote_types(stored.get(place.key, types[name]), types[name])
    out = []
    for mapping, place in table:
        dtype, rows = stored[place.key], place.shape[0]
        row_bytes = prod(place.shape[1:]) * dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes) if mapping.kind == "rows" else rows
        for row in range(0, rows, step):
            out.append(_Chunk(mapping, place, dtype, row, (min(step, rows - row), *place.shape[1:])))
    return out


def _write_model(aside: Aside, folder: HfFolder, shape: ModelShape, chunks: list[_Chunk], console: Console) -> None:
    path = aside.path / MODEL
    path.mkdir(exist_ok=True)
    parts = _parts(chunks, shape)
    done = aside.journal.done
    total = sum(chunk.size for chunk in chunks)
    there = sum(piece.length for part in done.values() for piece in part.pieces if piece.offsets is not None)
    conversion.require_room(path, total - there)
    with progress("converting", total, console, min(there, total)) as advance:
        planner = _Planner(chunks, lambda chunk: chunk.read(folder, shape), advance)
        writer = _Writer(path, thread_count=1)
        plans, metadata = planner.create_global_plan([SavePlan(items) for items in parts])
        results = []
        for plan in writer.prepare_global_plan(plans):
            results.append(_written(aside, writer, planner, plan))
    writer.finish(metadata, results)
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


def _written(aside: Aside, writer: "_Writer", planner: "_Planner", plan: SavePlan) -> list[WriteResult]:
    """Write one part, unless it is there, and write that down."""
    file = f"{plan.storage_data.prefix}0.distcp"
    path = aside.path / MODEL / file
    if file in aside.journal.done:
        part = aside.journal.done[file]
        if not path.exists() or record_of(path).xxh3 != part.xxh3:
            raise aside.differs(f"{path} is not what was written")
        pieces = {(p.key, p.offsets): p for p in part.pieces}
        if len(pieces) != len(plan.items):
            raise aside.differs(f"{path} holds other tensors")
        return [
            WriteResult(i.index, p.length, _StorageInfo(file, p.begin, p.length))
            for i in plan.items
            for p in [pieces[i.index.fqn, None if i.index.offset is None else tuple(i.index.offset)]]
        ]
    try:
        results = writer.write_data(plan, planner).value()
    except RuntimeError as e:  # what torch.save makes of a disk that is full
        raise StorageError(
            f"{path} cannot be written ({' '.join(str(e).split())[:200]}): make room on the disk"
        ) from None
    pieces_of = [
        Piece(
            r.index.fqn,
            None if r.index.offset is None else tuple(r.index.offset),
            r.storage_data.offset,
            r.storage_data.length,
        )
        for r in results
    ]
    found = record_of(path)
    sync_folder(path.parent)
    aside.record({file: Part(found.size, found.xxh3, pieces_of)})
    return results


class _Planner(DefaultSavePlanner):
    """Gives torch's writer each tensor when it asks for it."""

    def __init__(self, chunks: list[_Chunk], read: Callable[[_Chunk], torch.Tensor], advance: Callable[[int], None]):
        super().__init__(flatten_state_dict=False)
        self._chunks = {chunk.item.index: chunk for chunk in chunks}
        if len(self._chunks) != len(chunks):
            raise DapoError("two chunks of the checkpoint have one place")
        self._read, self._advance = read, advance

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            out = io.BytesIO()
            torch.save([None], out)  # as megatron-core stores an object of one shard
            return out
        chunk = self._chunks[write_item.index]
        self._advance(chunk.size)
        return self._read(chunk)


class _Writer(FileSystemWriter):
    """torch's writer, whose metadata do not depend on where and when it wrote."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def _write_manifest(aside: Aside, shape: ModelShape, types: set[torch.dtype]) -> None:
    files = {}
    for name in sorted(files_in(aside.path) - {conversion.JOURNAL}):
        part = aside.journal.done.get(Path(name).name)
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
