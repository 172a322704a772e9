"""A bucket's file: its bytes, a full disk, a disk that does not answer."""

import os
import resource
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.tiny import hf_folder, run_config

from dapo_megatron.errors import StorageError
from dapo_megatron.resharding.disk import DiskTransport, Writing, file_name, write_bucket
from dapo_megatron.resharding.fill import fill
from dapo_megatron.resharding.plan import Bucket
from dapo_megatron.run_folder import RunFolder

BUCKET = Bucket(("b.weight", "a.weight"), ((30, 4), (7,)), "bfloat16")
TENSORS = {"b.weight": torch.randn(30, 4), "a.weight": torch.randn(7)}


def flat():
    return fill(BUCKET, iter(TENSORS.items()), torch.device("cpu"))


def test_a_file_holds_the_bucket(tmp_path):
    path = tmp_path / "weights" / "1.partial" / file_name(BUCKET)
    write_bucket(path, BUCKET, flat())
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and path.name == "b.weight.safetensors"
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in TENSORS.items())


def test_a_bucket_that_is_written_is_on_the_disk(tmp_path, monkeypatch):
    """Engines on other nodes read it as soon as the folder has its name."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_bucket(tmp_path / file_name(BUCKET), BUCKET, flat())
    assert synced == [str(tmp_path / file_name(BUCKET))]


def on_a_full_disk(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as a full disk, a write fails; only this process has it
    with pytest.raises(StorageError, match="cannot be written .*: make room on the disk of the run folder") as e:
        write_bucket(path, BUCKET, flat())
    return str(e.value), path.exists()


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = tmp_path / file_name(BUCKET)
    ((message, exists),) = run_ranks(1, on_a_full_disk, path)
    assert message.startswith(str(path)) and "\n" not in message and not exists


def push_beside_strangers(config):
    """What is in the folder of weights after each of two commits to no engines, and in the end."""
    actor, folder = actor_on_rank(config), RunFolder(Path(config.run_dir)).weights
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / ".nfs0000000001").touch()
    (folder / "7.d").mkdir()
    (folder / "8").symlink_to(folder.parent)
    (folder / "6.partial").mkdir()
    transport, seen = DiskTransport(config, actor.shape, actor.layout), []
    for version in (601, 602):
        (folder / f"{version}.partial").mkdir()
        transport.commit(version)
        seen.append(sorted(p.name for p in folder.iterdir()))
    transport.close()
    return [*seen, sorted(p.name for p in folder.iterdir())]


def test_what_is_not_ours_disturbs_no_push_and_stays(tmp_path):
    config = run_config(hf_folder(tmp_path / "hf", layers=1), resharding={"transport": "disk"})
    (seen,) = run_ranks(1, push_beside_strangers, config.model_copy(update={"run_dir": str(tmp_path / "run")}))
    strangers = [".nfs0000000001", "7.d", "8", "notes.txt"]
    assert seen == [sorted([*strangers, "601"]), sorted([*strangers, "602"]), strangers]
    assert (tmp_path / "run" / "weights" / "notes.txt").read_text() == "mine"


def test_a_disk_that_does_not_answer_is_told_with_the_file(tmp_path):
    path = tmp_path / file_name(BUCKET)
    with pytest.raises(StorageError, match=f"{path} was not written within 1 s"):
        Writing(path, Future(), 1).wait()
