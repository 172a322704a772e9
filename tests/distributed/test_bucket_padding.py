"""A tied embedding that two stages share has a bucket of its own, and what stands before or after it is padded."""

import pytest

from tests.distributed.harness import run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_save import config_of, relaid, save, save_again

from dapo_megatron.checkpoint.inspect import differences
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.run_folder import RunFolder

PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_tied_embedding_that_does_not_fill_its_bucket_comes_back(tmp_path, kind):
    """67 x 64 elements are no multiple of 128: saved by two stages, then by one, then by two again."""
    config = config_of(tmp_path, kind, PP2, {"tied": True}, checkpoint={"keep_last": 3})
    run_ranks(2, save, config, [1], "fully_reshardable")
    run_ranks(1, save_again, relaid(config, {}), 2, "fully_reshardable")
    run_ranks(2, save_again, config, 3, "fully_reshardable")
    paths = [RunFolder(tmp_path / "run").checkpoint(step) for step in (1, 2, 3)]
    for other in paths[1:]:
        assert [line for line in differences(paths[0], other) if not line.startswith("random.")] == []
        assert read_manifest(other).audit.optimizer == read_manifest(paths[0]).audit.optimizer
