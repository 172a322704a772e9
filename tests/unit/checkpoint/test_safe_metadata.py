"""What torch's reader finds wrong is one line, about what is wrong."""

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron.checkpoint.safe_metadata import common_fits, metadata_fits
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
