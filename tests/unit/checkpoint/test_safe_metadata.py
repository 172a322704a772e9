"""What torch's reader finds wrong is one line, about what is wrong."""

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron.checkpoint.safe_metadata import metadata_fits
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
