"""The weights of a distributed checkpoint, read a parameter at a time in one process without process groups."""

import io
import pickle
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dapo_megatron.checkpoint.conversion.stored_keys import WEIGHT_PREFIXES, Place, places
from dapo_megatron.checkpoint.crc import without_crc
from dapo_megatron.checkpoint.safe_metadata import read_metadata
from dapo_megatron.errors import DapoError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import ParameterMapping, some_names


class StoredWeights:
    """The weights in the `model` folder of a checkpoint, of a run or converted; the optimizer's state is passed over.

    Raises:
        StorageError: `.metadata` cannot be read or names files elsewhere.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        metadata = read_metadata(folder)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(WEIGHT_PREFIXES)
        }
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def check(self, shape: ModelShape) -> None:
        """Account for every weight of the model; the embedding may have rows of padding.

        Raises:
            DapoError: lists weights that are missing, unexpected or of another shape.
        """
        table = places(shape)
        faults, expected = [], {place.key: (mapping, place) for mapping, place in table}
        if missing := expected.keys() - self._tensors.keys():
            faults.append(f"{len(missing)} weights are missing: {some_names(missing)}")
        if extra := self._tensors.keys() - expected.keys():
            faults.append(f"{len(extra)} weights are not part of the model: {some_names(extra)}")
        wrong = [
            f"{key} has shape {tuple(self._tensors[key].size)}, config.json says {place.stored_shape}"
            for key, (mapping, place) in expected.items()
            if key in self._tensors and not _fits(mapping, place, tuple(self._tensors[key].size))
        ]
        if wrong:
            faults.append(some_names(wrong, order=False))
        if faults:
            raise DapoError(f"{self.folder}: {'; '.join(faults)}")

    def dtype(self, place: Place) -> torch.dtype:
        """The type it is stored in."""
        return self._tensors[place.key].properties.dtype

    def parameter(self, place: Place) -> torch.Tensor:
        """One whole parameter of one layer, as one tensor-parallel rank would hold it, without padding."""
        return self._read(place, (0,) * len(place.shape), place.shape)

    def row_blocks(self, place: Place, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(row, block) of the rows from `first` to `end` of a parameter, cut as they are stored: one is in memory."""
        axis = len(place.index)
        inside = {c.offsets[axis] for c in self._tensors[place.key].chunks if first < c.offsets[axis] < end}
        cuts = [first, *sorted(inside), end]
        for row, after in zip(cuts, cuts[1:], strict=False):
            yield row, self._read(place, (row, *(0 for _ in place.shape[1:])), (after - row, *place.shape[1:]))

    def _read(self, place: Place, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        box = ChunkStorageMetadata(torch.Size(place.index + offsets), torch.Size((1,) * len(place.index) + sizes))
        entry = self._tensors[place.key]
        items = create_read_items_for_chunk_list(place.key, entry, [box])
        if sum(prod(item.lengths) for item in items) != prod(sizes):
            raise DapoError(f"{self.folder}: the pieces of {place.key} leave gaps or overlap: use another checkpoint")
        target = _Target(torch.empty(box.sizes, dtype=entry.properties.dtype))
        try:
            with without_crc():
                self._reader.read_data(LoadPlan(items), target).wait()
        except (OSError, EOFError, KeyError, RuntimeError, AssertionError, pickle.UnpicklingError) as e:
            reason = " ".join(str(e).split())[:200]
            raise DapoError(f"{self.folder}: {place.key} cannot be read ({reason}): use another checkpoint") from None
        return target.tensor.view(sizes)


def _fits(mapping: ParameterMapping, place: Place, found: tuple[int, ...]) -> bool:
    expected = place.stored_shape
    return found == expected or (mapping.kind == "rows" and found[1:] == expected[1:] and found[0] > expected[0])


class _Target(LoadPlanner):
    """Takes what torch's reader reads into one tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        out = self.tensor
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            out = out.narrow(axis, offset, length)
        return out

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: it was read into its place."""

    # What only a load of a whole state asks for.

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError
