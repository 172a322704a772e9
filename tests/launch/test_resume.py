"""What a resume takes, refuses and leaves alone, seen from the command line."""

import shutil

import pytest
import yaml

from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.observe.samples import read_samples
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import finish, recipe, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def error_of(output):
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def test_a_damaged_checkpoint_a_changed_config_and_a_new_run_from_weights(tmp_path):
    path = recipe(tmp_path, trainer={"steps": 2}, checkpoint={"every": 1, "keep_last": 5})
    folder = RunFolder(tmp_path / "run")
    code, output, _ = finish(start(path))
    assert code == 0, output
    formats = [read_manifest(folder.checkpoint(step)).format for step in (1, 2)]
    assert formats == ["dp_reshardable", "fully_reshardable"]
    begun_with = folder.config.read_bytes()

    code, output, _ = finish(start(path, "--resume", "trainer.steps=3", "seed=5"))
    assert code == 1 and "a resume cannot change seed from 0 to 5" in error_of(output)
    assert folder.config.read_bytes() == begun_with

    shard = folder.checkpoint(2) / "model/__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    code, output, _ = finish(start(path, "--resume", "trainer.steps=3"))
    assert code == 1 and "step_000002/model/__1_0.distcp is damaged" in error_of(output), output
    assert "step_000001 is the newest intact one, --resume=latest-intact goes on from there" in error_of(output)

    code, output, _ = finish(start(path, "--resume=latest-intact", "trainer.steps=3", "optimizer.lr=0.0005"))
    assert code == 0, output
    assert "resume from" in output and "step_000001" in output
    assert "changed since the last start: optimizer.lr: 0.001 -> 0.0005" in output
    assert folder.config.read_bytes() == begun_with
    changed = folder.resumed_config(2).read_text()  # 1 is of the resume that failed
    assert yaml.safe_load(changed)["optimizer"]["lr"] == 0.0005
    assert "# resumed from step_000001, with\n" in changed and "# trainer.steps: 2 -> 3\n" in changed
    assert (folder.checkpoints / ".step_000002.damaged").is_dir()
    assert [read_manifest(folder.checkpoint(step)).step for step in (1, 2, 3)] == [1, 2, 3]
    assert [record["step"] for record in read_metrics(folder)] == [0, 1, 2, 3]
    # Engines were at version 2 in the life before, and at 0 when they started again.
    versions = {row["step"]: {v for r in row["responses"] for v in r["versions"]} for row in read_samples(folder)}
    assert versions == {1: {0}, 2: {1}, 3: {2}}

    weights = folder.checkpoint(3)
    options = ("trainer.steps=2", "evaluation.every=1", "checkpoint.keep_best=1", "trainer.stop_at={eval/accuracy: 2}")
    second = RunFolder(tmp_path / "second")
    new = ("actor.tensor_model_parallel_size=1", f"run_dir={second.path}", f"--resume-weights-only={weights}")
    code, output, _ = finish(start(path, *options, *new))
    assert code == 0, output
    assert [record["step"] for record in read_metrics(second)] == [0, 1, 2]
    last = read_manifest(second.checkpoint(2))
    assert (last.updates, last.format) == (4, "fully_reshardable") and "eval/accuracy" in last.metrics

    shutil.copytree(second.checkpoint(2), second.checkpoints / "step_000007")
    code, output, _ = finish(start(path, *options, *new[:2], "--resume"))
    assert code == 1 and "is the checkpoint step_000002 under another name" in error_of(output)
    code, output, _ = finish(start(path, *options, *new))
    assert code == 1 and "holds a run already" in error_of(output)
