"""What torch's reader finds wrong is one line, about what is wrong."""

import pickle

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dapo_megatron.checkpoint.safe_metadata import COMMON, METADATA, check_objects, common_fits, metadata_fits
from dapo_megatron.errors import StorageError


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(5, "Input/output error"), "{} cannot be read: [Errno 5] Input/output error"),
        (FileNotFoundError(2, "No such file"), "{}/.metadata does not fit a checkpoint: [Errno 2] No such file"),
        (RuntimeError("Missing key\nin it"), "{}/.metadata does not fit a checkpoint: Missing key in it"),
    ],
)
def test_a_disk_that_fails_is_not_taken_for_metadata_that_do_not_fit(tmp_path, error, says):
    with pytest.raises(StorageError) as e, metadata_fits(tmp_path, "a checkpoint"):
        raise CheckpointException("read", {0: (error, None)})
    assert str(e.value) == says.format(tmp_path)


def test_only_a_merge_that_fails_is_told_of_what_ranks_share(tmp_path):
    with (
        pytest.raises(StorageError, match="common.pt does not fit .*metadata: Cannot merge two"),
        common_fits(tmp_path),
    ):
        raise ValueError("Cannot merge two lists with different\nlengths (1 and 2, encountered at level ())")
    with pytest.raises(ValueError, match="of something else"), common_fits(tmp_path):
        raise ValueError("of something else")


@pytest.mark.parametrize(
    ("rows", "is_whole"),
    [([(0, 2), (2, 2)], True), ([(0, 2)], False), ([(0, 2), (2, 1)], False), ([(0, 2), (1, 2), (2, 2)], False)],
)
def test_the_pieces_of_a_tensor_are_all_of_it_once(tmp_path, rows, is_whole):
    """(first, number) of the rows of each piece of a tensor [4, 3]."""
    pieces = [ChunkStorageMetadata(torch.Size((first, 0)), torch.Size((count, 3))) for first, count in rows]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size((4, 3)), pieces)
    (tmp_path / METADATA).write_bytes(pickle.dumps(Metadata({"weight": tensor}, None, {})))
    torch.save({}, tmp_path / COMMON)
    if is_whole:
        assert check_objects(tmp_path).state_dict_metadata["weight"].size == (4, 3)
    else:
        with pytest.raises(StorageError, match="the pieces of weight leave gaps or overlap"):
            check_objects(tmp_path)
