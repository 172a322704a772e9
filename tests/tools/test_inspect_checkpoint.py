"""Looking into checkpoints from the command line."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.distributed.harness import run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_save import config_of, save

from dapo_megatron.checkpoint.inspect import differences, stored_tensors
from dapo_megatron.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("inspect")
    config = config_of(folder, actor={"data_parallel_size": 2}, checkpoint={"keep_last": 9})
    run_ranks(2, save, config, [1, 2, 3], "dp_reshardable")
    return RunFolder(folder / "run")


def inspect(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "tools.inspect_checkpoint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"})


def test_a_run_folder_is_summed_up_and_verified(run):
    found = inspect(run.path, "--verify")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("intact: 8 files") == 3
    for text in ("dp_reshardable", "Qwen3ForCausalLM, 2 layers, float32", "dp=2", "3, 3", "megatron-core"):
        assert text in found.stdout, text
    assert "epoch 0, 3 prompts of it given out, 3 groups issued, 0 carried" in found.stdout


def test_tensors_are_listed(run):
    found = inspect(run.checkpoint(2), "--tensors")
    assert found.returncode == 0 and "67x64" in found.stdout and "embedding.word_embeddings.weight" in found.stdout
    sizes = {t.name: t.size for t in stored_tensors(run.checkpoint(2))}
    assert sizes["embedding.word_embeddings.weight"] == 67 * 64 * 4


def test_differences_are_named_and_counted(run, tmp_path):
    same = inspect("--diff", run.checkpoint(1), run.checkpoint(1))
    assert same.returncode == 0 and "every tensor is the same, bit for bit" in same.stdout
    other = inspect("--diff", run.checkpoint(1), run.checkpoint(2))
    assert other.returncode == 1
    assert (
        "decoder.layers.mlp.linear_fc2.weight: " in other.stdout and " elements differ, by up to 0.00" in other.stdout
    )
    assert len(list(differences(run.checkpoint(1), run.checkpoint(2)))) >= 12


def test_damaged_checkpoints_are_not_compared(run, tmp_path):
    other = tmp_path / "step_000002"
    shutil.copytree(run.checkpoint(2), other)
    os.truncate(other / "model/__0_0.distcp", 500)
    found = inspect("--diff", run.checkpoint(2), other)
    assert (
        found.returncode == 1 and "__0_0.distcp has 500 bytes" in found.stderr and len(found.stderr.splitlines()) == 1
    )


def test_mistakes_and_damage_are_one_line(run, tmp_path):
    assert "--diff compares two checkpoints, 1 were given" in inspect("--diff", run.checkpoint(1)).stderr
    assert "neither a checkpoint nor a run folder" in inspect(tmp_path).stderr
    (run.checkpoint(3) / "model/common.pt").unlink()
    found = inspect(run.path, "--verify")
    assert found.returncode == 1 and found.stdout.count("intact:") == 2
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("damaged: ")]
    assert "step_000003/model/common.pt is missing" in line and "Traceback" not in found.stderr
