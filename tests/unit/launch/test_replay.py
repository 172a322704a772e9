"""What is given to a replay: dumped batches, and nothing that only looks like one."""

import pytest

from dapo_megatron.errors import ConfigError
from launch.replay import find_batches, step_of_batch


def test_files_of_another_name_are_no_batches(tmp_path):
    folder = tmp_path / "batches"
    folder.mkdir()
    for name in ("step_000002.msgpack", "step_000003.msgpack", "step_x.msgpack", "mine.msgpack", "step_3.msgpack.old"):
        (folder / name).touch()
    _, found = find_batches(tmp_path)
    assert [step_of_batch(path) for path in found] == [2, 3]
    assert find_batches(folder / "step_000003.msgpack")[1] == [folder / "step_000003.msgpack"]
    for other in ("mine.msgpack", "step_x.msgpack"):
        with pytest.raises(ConfigError, match="is no dump, no dumped batch and no run"):
            find_batches(folder / other)
