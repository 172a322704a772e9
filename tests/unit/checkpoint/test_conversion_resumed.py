"""A conversion that was killed, or whose disk was full, goes on; with anything else it refuses."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from dapo_megatron.checkpoint.conversion import dist_to_hf, hf_to_dist, output
from dapo_megatron.checkpoint.conversion.stored_keys import places
from dapo_megatron.checkpoint.conversion.stored_weights import StoredWeights
from dapo_megatron.errors import DapoError, StorageError
from dapo_megatron.weights import hf_writer
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.table import hf_names
from tests.tiny import hf_folder
from tests.unit.checkpoint.conversions import back, damage, shuffled_into, there, tree


class Stop(Exception):
    """Stands for an interrupt."""


def killed_in(function, *args):
    """Run in a process that kills itself; it has no time to tidy up."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def kill_after(owner, name, calls):
    """Replace a method, in a process that is to die, by one that kills it in a later call."""

    def kill(count):
        if count > calls:
            time.sleep(0.3)  # what is on its way to the disk arrives
            os.kill(os.getpid(), signal.SIGKILL)

    counting(setattr, owner, name, kill)


def counting(setattr, owner, name, then=lambda count: None):
    """Replace a method, by `setattr`, by one that counts its calls; returns the count."""
    original, count = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        then(count[0])
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    return count


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(hf_to_dist, "PART_BYTES", 40_000)
    monkeypatch.setattr(hf_to_dist, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(output, "JOURNAL_EVERY", 40_000)


@pytest.mark.parametrize("calls", [0, 9, 30, 43])
def test_a_killed_conversion_goes_on(tmp_path, monkeypatch, small_parts, calls):
    path = hf_folder(tmp_path / "hf", "qwen2", False, layers=3, vocab=67)
    there(path, tmp_path / "whole")

    def killed():
        kill_after(hf_to_dist._Chunk, "read", calls)
        there(path, tmp_path / "dist")

    killed_in(killed)
    assert not (tmp_path / "dist").exists()
    count = counting(monkeypatch.setattr, hf_to_dist._Chunk, "read")
    there(path, tmp_path / "dist")
    assert tree(tmp_path / "dist") == tree(tmp_path / "whole")
    assert not (tmp_path / "dist.partial").exists()
    if calls == 43:
        assert count[0] < 30  # of 50
    assert count[0] >= 50 - calls


@pytest.mark.parametrize("calls", [0, 9, 30])
def test_a_killed_conversion_back_goes_on(tmp_path, monkeypatch, small_parts, calls):
    path = hf_folder(tmp_path / "hf", "qwen2", False, layers=3, vocab=67)
    there(path, tmp_path / "dist")

    def killed():
        kill_after(StoredWeights, "_read", calls)
        back(tmp_path / "dist", tmp_path / "back")

    killed_in(killed)
    assert not (tmp_path / "back").exists()
    count = counting(monkeypatch.setattr, StoredWeights, "_read")
    back(tmp_path / "dist", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path)
    if calls == 30:
        assert count[0] < 40  # of 50


def test_nothing_that_is_done_is_read_again(tmp_path):
    path = hf_folder(tmp_path / "hf")
    there(path, tmp_path / "dist")
    shape, weights = read_model(path), StoredWeights(tmp_path / "dist" / "model")
    done = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"}
    assert {name for name, _, _ in dist_to_hf._blocks(places(shape), shape, weights, done)} == hf_names(shape) - done


def stop_at(monkeypatch, call):
    """Writing a tensor raises at that call."""

    def then(count):
        if count == call:
            raise Stop

    counting(monkeypatch.setattr, hf_writer.HfWriter, "write", then)


def test_a_conversion_back_goes_on_from_any_tensor_also_between_two_of_one_parameter(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "JOURNAL_EVERY", 1)
    path = hf_folder(tmp_path / "hf", "qwen2", True, layers=1)
    there(path, tmp_path / "dist")
    for call in range(2, 6):  # after q, k, v and the output projection
        out = tmp_path / f"back-{call}"
        with monkeypatch.context() as m, pytest.raises(Stop):
            stop_at(m, call)
            back(tmp_path / "dist", out)
        back(tmp_path / "dist", out)
        assert tree(out) == tree(path)


def test_what_the_journal_names_is_on_the_disk(tmp_path, monkeypatch, small_parts):
    path, synced, named = hf_folder(tmp_path / "hf", layers=1), set(), []
    fsync, record = os.fsync, output.Aside.record

    def seen(handle):
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def recorded(aside, parts):
        named.extend(parts)
        files = {name if name.endswith(".distcp") else "model.safetensors" for name in parts}
        assert files <= synced
        synced.clear()
        record(aside, parts)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(output.Aside, "record", recorded)
    there(path, tmp_path / "dist")
    files = list(named)
    back(tmp_path / "dist", tmp_path / "back")
    assert sorted(files) == sorted(p.name for p in (tmp_path / "dist/model").glob("*.distcp")) and len(files) > 2
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(named)


def test_what_is_left_must_fit_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "JOURNAL_EVERY", 1)
    path, dist, out = hf_folder(tmp_path / "hf", layers=1), tmp_path / "dist", tmp_path / "back"
    size = there(path, tmp_path / "first")
    room = {"free": size - 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(**room))
    for convert, source, made in ((there, path, dist), (back, dist, out)):
        room["free"] = size - 1
        with pytest.raises(StorageError, match=f"{made}.partial.* needs 0.0 GB more, 0.0 are free: make room"):
            convert(source, made)
        room["free"] = size
        if convert is back:
            with monkeypatch.context() as m, pytest.raises(Stop):
                stop_at(m, 4)
                convert(source, made)
            room["free"] = size - 1  # a part is there
        convert(source, made)
    assert tree(out) == tree(path)


def interrupted(path, out, calls=30):
    def killed():
        kill_after(hf_to_dist._Chunk, "read", calls)
        there(path, out)

    killed_in(killed)


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, small_parts):
    path, out, partial = hf_folder(tmp_path / "hf", layers=3), tmp_path / "dist", tmp_path / "dist.partial"
    interrupted(path, out)
    (part, *_) = msgspec.json.decode((partial / output.JOURNAL).read_bytes())["done"]

    def refused(says):
        with pytest.raises(DapoError, match=says) as e:
            there(path, out)
        assert str(e.value).startswith(f"{partial}") and str(e.value).endswith("the conversion begins anew")

    with pytest.raises(DapoError, match="was made with dtype=as in the source, to=dist, now it is dtype=bfloat16"):
        there(path, out, torch.bfloat16)
    with pytest.raises(DapoError, match="to=hf"):
        back_of = tmp_path / "other"
        there(path, back_of)
        back(back_of, out)
    os.utime(path / "config.json", (1, 1))
    refused("config.json of the source has changed since")
    shutil.rmtree(partial)
    interrupted(path, out)
    damage(partial / "output" / "model" / part, 300)
    refused(f"{part} is not what was written")
    (partial / output.JOURNAL).write_text("{")
    refused("its journal is damaged")
    (partial / output.JOURNAL).unlink()
    with pytest.raises(DapoError, match="dist.partial, where the output would be made, holds something else: move it"):
        there(path, out)
    shutil.rmtree(partial)
    there(path, out)


def test_a_conversion_killed_when_it_was_published_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    path, out = hf_folder(tmp_path / "hf"), tmp_path / "dist"
    rmtree = shutil.rmtree
    monkeypatch.setattr(output.shutil, "rmtree", lambda _: None)
    there(path, out)
    monkeypatch.undo()
    whole = tree(out)
    assert [p.name for p in (tmp_path / "dist.partial").iterdir()] == [output.JOURNAL]
    rmtree(out)
    there(path, out)
    assert tree(out) == whole and not (tmp_path / "dist.partial").exists()


def test_files_of_like_that_were_split_anew_are_not_gone_on_with(tmp_path):
    path = hf_folder(tmp_path / "hf")
    there(path, tmp_path / "dist")

    def killed():
        kill_after(StoredWeights, "_read", 0)
        back(tmp_path / "dist", tmp_path / "back", torch.bfloat16, path)

    killed_in(killed)
    shuffled_into(path, 2)
    with pytest.raises(DapoError, match="model.safetensors of the source has changed since"):
        back(tmp_path / "dist", tmp_path / "back", torch.bfloat16, path)


def test_damage_to_a_half_written_folder_is_seen(tmp_path, small_parts):
    path = hf_folder(tmp_path / "hf", layers=3)
    there(path, tmp_path / "dist")

    def killed():
        kill_after(StoredWeights, "_read", 30)
        back(tmp_path / "dist", tmp_path / "back")

    killed_in(killed)
    file = tmp_path / "back.partial" / "output" / "model.safetensors"
    done = msgspec.json.decode((tmp_path / "back.partial" / output.JOURNAL).read_bytes())["done"]
    header = hf_writer.read_header(path / "model.safetensors")
    damage(file, 8 + len(header.encode()) + hf_writer.parse_header(header)[sorted(done)[0]].begin)
    with pytest.raises(DapoError, match=f"{sorted(done)[0]} is not what was written"):
        back(tmp_path / "dist", tmp_path / "back")


def test_two_processes_do_not_write_one_output(tmp_path):
    path = hf_folder(tmp_path / "hf")
    (tmp_path / "dist.partial").mkdir()
    handle = os.open(tmp_path / "dist.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DapoError, match="is being written by another process"):
        there(path, tmp_path / "dist")
    os.close(handle)
    there(path, tmp_path / "dist")
    with pytest.raises(DapoError, match="dist exists: remove it, or choose another folder"):
        there(path, tmp_path / "dist")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_the_conversion_goes_on(tmp_path, monkeypatch, small_disk, small_parts):
    path, out = hf_folder(tmp_path / "hf", "qwen3", False, layers=8), small_disk / "dist"
    (small_disk / "filling").write_bytes(bytes(1_200_000))
    with pytest.raises(StorageError, match="GB more"):
        there(path, out)
    monkeypatch.setattr(output, "require_room", lambda *_: None)  # another process may fill the disk meanwhile
    with pytest.raises(StorageError, match="dist.partial.* cannot be written .*: make room"):
        there(path, out)
    assert not out.exists()
    (small_disk / "filling").unlink()
    there(path, out)
    shutil.move(out, tmp_path / "dist")
    (small_disk / "filling").write_bytes(bytes(1_200_000))
    with pytest.raises(StorageError, match="back.partial cannot be written .*: make room"):
        back(tmp_path / "dist", small_disk / "back")
    (small_disk / "filling").unlink()
    back(tmp_path / "dist", small_disk / "back")
    assert tree(small_disk / "back") == tree(path)


def test_the_room_is_asked_for_first(tmp_path, monkeypatch):
    path = hf_folder(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="GB more, 0.0 are free: make room"):
        there(path, tmp_path / "dist")
