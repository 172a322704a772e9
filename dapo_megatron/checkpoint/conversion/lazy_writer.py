"""torch's own writer of distributed checkpoints, in one process, given each tensor only when it asks for its bytes.

To the writer every part is one rank's plan, so every part is a file. While one is written, the part before it is
brought to the disk, hashed and written down in the journal by a thread; a part that is in the journal is not written
again.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dapo_megatron.checkpoint.conversion.output import Aside, Part, Piece
from dapo_megatron.checkpoint.crc import without_crc
from dapo_megatron.checkpoint.integrity import record_of
from dapo_megatron.checkpoint.store import sync_folder
from dapo_megatron.errors import StorageError


def write_lazily(
    aside: Aside, path: Path, parts: Sequence[list[WriteItem]], read: Callable[[MetadataIndex], torch.Tensor]
) -> None:
    """Write a distributed checkpoint into the folder `path`, all but megatron-core's own small files.

    Args:
        parts: what goes into each file. Items without tensor data are objects, all of them None.
        read: gives a tensor by its key and offsets; is asked for those that are not there, in the order of the parts.

    Raises:
        StorageError: the disk is full or lost.
        DapoError: what an interrupted call left is not what it wrote.
    """
    planner, writer = _Planner(read), _Writer(path, sync_files=False)
    plans, metadata = planner.create_global_plan([SavePlan(items) for items in parts])  # checks that nothing overlaps
    results: list[list[WriteResult]] = []
    with without_crc(), ThreadPoolExecutor(1) as thread:
        settled: list[Future[None]] = []
        for plan in writer.prepare_global_plan(plans):
            file = f"{plan.storage_data.prefix}0.distcp"
            if file in aside.journal.done:
                results.append(_taken_up(aside, path / file, plan))
                continue
            try:
                results.append(writer.write_data(plan, planner).value())
            except RuntimeError as e:  # what torch.save makes of a disk that is full
                reason = " ".join(str(e).split())[:200]
                raise StorageError(f"{path / file} cannot be written ({reason}): make room on the disk") from None
            settled.append(thread.submit(_settle, aside, path / file, results[-1]))
            for past in settled:
                if past.done():
                    past.result()
        for past in settled:
            past.result()
    writer.sync_files = True
    writer.finish(metadata, results)


def _settle(aside: Aside, path: Path, results: list[WriteResult]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    sync_folder(path.parent)
    found = record_of(path)
    pieces = [Piece(*_name(r.index), r.storage_data.offset, r.storage_data.length) for r in results]
    aside.record({path.name: Part(found.size, found.xxh3, pieces)})


def _taken_up(aside: Aside, path: Path, plan: SavePlan) -> list[WriteResult]:
    """The results of a part that was written before."""
    part = aside.journal.done[path.name]
    pieces = {(piece.key, piece.offsets): piece for piece in part.pieces}
    if not path.exists() or record_of(path).xxh3 != part.xxh3 or {_name(i.index) for i in plan.items} != pieces.keys():
        raise aside.differs(f"{path} is not what was written")
    found = [(item.index, pieces[_name(item.index)]) for item in plan.items]
    return [WriteResult(index, p.length, _StorageInfo(path.name, p.begin, p.length)) for index, p in found]


def _name(index: MetadataIndex) -> tuple[str, tuple[int, ...] | None]:
    return index.fqn, None if index.offset is None else tuple(index.offset)


class _Planner(DefaultSavePlanner):
    def __init__(self, read: Callable[[MetadataIndex], torch.Tensor]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type != WriteItemType.BYTE_IO:
            return self._read(write_item.index)
        out = io.BytesIO()
        torch.save([None], out)  # as megatron-core stores an object of one shard
        return out


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Nothing of where and when it was written: the same weights make the same files."""
        return StorageMeta()
