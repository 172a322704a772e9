"""One rank's part of a distributed checkpoint: planned and copied now, written while training goes on.

The state is megatron-core's sharded state dict, the files are torch's (`torch_dist`), so that megatron-core loads them.
What differs from dist_checkpointing.save is who waits: nothing here touches the disk before the copy is made, and no
rank waits for another's disk inside a collective.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from dapo_megatron.checkpoint.crc import without_crc
from dapo_megatron.checkpoint.integrity import records_of
from dapo_megatron.checkpoint.manifest import FileRecord
from dapo_megatron.checkpoint.safe_metadata import COMMON, METADATA
from dapo_megatron.distributed.agreement import gather_on_first_rank
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import StorageError

CONFIG = "metadata.json"
"""megatron-core's own note of the format."""


@dataclass(frozen=True)
class Copy:
    """A copy in host memory of what this rank writes."""

    plan: SavePlan
    items: dict[MetadataIndex, Any]
    """Tensors, and serialised objects."""
    common: dict[str, Any] | None
    """State that is the same on all ranks; rank 0 writes it."""
    metadata: Metadata | None
    """Of all ranks' parts, on rank 0."""

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.itemsize for t in self.items.values() if torch.is_tensor(t))


def copy_state(state: dict[str, Any], layout: Layout) -> Copy:
    """Share out a sharded state dict over all ranks, about equally, and copy this rank's part; collective.

    Replicas (over data, context and, for norms, tensor parallelism) are written by one rank each, chosen by
    megatron-core's fully parallel strategy.
    """
    sharded, common = save_preprocess(state)
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1))
    strategy.apply_saving_parallelization(sharded)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=layout.rank == 0)
    plan = planner.create_local_plan()
    plans = gather_on_first_rank("planning the checkpoint", plan, layout)
    metadata = planner.create_global_plan(plans)[1] if plans is not None else None
    items = {item.index: _copy(planner.resolve_data(item)) for item in plan.items}
    return Copy(plan, items, common if layout.rank == 0 else None, metadata)


def _copy(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if torch.is_tensor(data) else data


class _FromCopy(MCoreSavePlanner):
    """Gives torch's writer what was copied."""

    def __init__(self, items: dict[MetadataIndex, Any]):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._items = items

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._items[write_item.index]


@dataclass(frozen=True)
class Written:
    """What one rank has written."""

    results: list[WriteResult]
    files: dict[str, FileRecord]
    """By path in the folder of the distributed checkpoint."""
    size: int
    """Bytes of the tensors."""


def write_copy(copy: Copy, path: Path, rank: int) -> Written:
    """Write one rank's copy into the folder `path`, through to the disk, and hash what was written.

    Raises:
        StorageError: torch could not write.
        OSError: the disk is full or gone.
    """
    try:
        return _write_copy(copy, path, rank)
    except RuntimeError as e:  # torch.save where the disk is full
        reason = " ".join(str(e).split())[-300:]
        raise StorageError(f"{path} cannot be written ({reason}): make room on the disk of the run") from None


def _write_copy(copy: Copy, path: Path, rank: int) -> Written:
    writer = FileSystemWriter(path, per_thread_copy_ahead=0)
    # The number of a plan in the list is the rank in its files' names.
    plan = writer.prepare_global_plan([copy.plan] * (rank + 1))[rank]
    with without_crc():
        results = list(writer.write_data(plan, _FromCopy(copy.items)).wait())
    names = {result.storage_data.relative_path for result in results}
    if copy.common is not None:
        torch.save(copy.common, path / COMMON)
        save_config(CheckpointingConfig("torch_dist", 1), str(path))
        names |= {COMMON, CONFIG}
    return Written(results, records_of(path, sorted(names)), copy.size)


def write_parts(path: Path, metadata: Metadata, parts: list[Written]) -> dict[str, FileRecord]:
    """Complete a distributed checkpoint whose parts are all written; returns the records of all its files."""
    FileSystemWriter(path).finish(metadata, [part.results for part in parts])
    files = records_of(path, [METADATA])
    for part in parts:
        files |= part.files
    return files
