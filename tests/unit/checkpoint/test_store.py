"""Published, found, retained; the manifest as a file."""

import errno
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import xxhash

from dapo_megatron.checkpoint import integrity, store
from dapo_megatron.checkpoint.background import BackgroundCall
from dapo_megatron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    encode_manifest,
    model_numbers,
    read_manifest,
    require_model,
)
from dapo_megatron.config import CheckpointConfig
from dapo_megatron.errors import ConfigError, StorageError
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights import hf_folder
from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape, RopeScaling


def write(run_dir, step, metrics=None):
    folder, path = RunFolder(run_dir), store.open_partial(RunFolder(run_dir), step)
    manifest = Manifest(format="dp_reshardable", model={}, dtype="float32", step=step, metrics=metrics or {})
    hf = run_dir / "hf"
    hf.mkdir(exist_ok=True)
    store.seal(path, manifest, {}, hf, b"{}")
    return store.publish(folder, step)


def names(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_a_half_written_checkpoint_is_never_latest(tmp_path):
    write(tmp_path, 3)
    store.open_partial(RunFolder(tmp_path), 6)  # the program is killed here
    assert store.latest(RunFolder(tmp_path)).name == "step_000003"
    write(tmp_path, 6)
    assert store.latest(RunFolder(tmp_path)).name == "step_000006"


def test_a_step_that_is_done_again_takes_the_others_place(tmp_path):
    old = write(tmp_path, 3, {"eval/accuracy": 0.1})
    new = write(tmp_path, 3, {"eval/accuracy": 0.2})
    assert old == new and read_manifest(new).metrics == {"eval/accuracy": 0.2}
    assert names(tmp_path) == ["step_000003"]


def test_an_evaluation_that_came_late_is_added_to_an_intact_checkpoint(tmp_path):
    folder, path = RunFolder(tmp_path), write(tmp_path, 3)
    store.add_metrics(folder, 3, {"eval/accuracy": 0.25})
    store.add_metrics(folder, 4, {"eval/accuracy": 0.5})  # was not saved
    assert names(tmp_path) == ["step_000003"]
    assert integrity.intact_manifest(path).metrics == {"eval/accuracy": 0.25}
    store.add_metrics(folder, 3, {"eval/greedy_accuracy": 0.5})
    assert read_manifest(path).metrics == {"eval/accuracy": 0.25, "eval/greedy_accuracy": 0.5}
    (tmp_path / "checkpoints" / ".step_000003.manifest").write_text("killed here")
    store.clean(folder)
    assert names(tmp_path) == ["step_000003"] and store.latest(folder) == path


SHAPE = ModelShape(FAMILIES["Qwen3MoeForCausalLM"], 2, 64, 96, 8, 4, 8, 128, True, 1e-6, 1e4, None, 512)
SHAPE = replace(SHAPE, experts=Experts(8, 2, 32, True))


@pytest.mark.parametrize(
    "change",
    [
        {"family": FAMILIES["Qwen3ForCausalLM"]},
        *({name: 1} for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_positions")),
        {"tied": False},
        {"norm_eps": 1e-5},
        {"rope_theta": 1e6},
        {"rope_scaling": RopeScaling("linear", (("factor", 2.0),))},
        {"window": 256},
        {"experts": None},
        {"experts": Experts(8, 2, 32, False)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_weights_of_another_model_are_refused(tmp_path, change):
    made = Manifest(format="weights", model=model_numbers(SHAPE), dtype="float32")
    require_model(made, tmp_path, SHAPE)
    with pytest.raises(ConfigError, match=f"{tmp_path} holds a model with {next(iter(change))}="):
        require_model(made, tmp_path, replace(SHAPE, **change))


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 2):
        write(tmp_path, step)
    assert [p.name for p in store.published(RunFolder(tmp_path))] == ["step_000002", "step_999999", "step_1000000"]


def test_whenever_it_is_killed_one_of_two_checkpoints_of_a_step_is_there(tmp_path, monkeypatch):
    """At the first rename, at the second, and after both."""
    rename = Path.rename
    for dies_at in (1, 2, 3):
        run_dir = tmp_path / str(dies_at)
        write(run_dir, 3, {"eval/accuracy": 0.1})
        calls = []

        def dies(self, target, calls=calls, dies_at=dies_at):
            calls.append(target)
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", dies)
        try:
            write(run_dir, 3, {"eval/accuracy": 0.2})
        except KeyboardInterrupt:
            assert dies_at < 3
        monkeypatch.setattr(Path, "rename", rename)
        store.clean(RunFolder(run_dir))
        found = read_manifest(store.latest(RunFolder(run_dir)))
        assert found.metrics["eval/accuracy"] == (0.2 if dies_at == 3 else 0.1)
        assert names(run_dir) == ["step_000003"]


def test_what_is_published_is_on_the_disk_before(tmp_path, monkeypatch):
    """Every file and folder is synced before the rename, the folder that holds the name after it."""
    done, fsync, rename = [], os.fsync, Path.rename

    def synced(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}").replace(".step_000003.partial", "step_000003"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda self, target: (done.append("rename"), rename(self, target))[1])
    final = write(tmp_path, 3)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert {str(final / name) for name in ("manifest.json", "controller.json", "model", "hf")} <= set(before)
    assert before.index(str(final / "manifest.json")) < len(before) - 1 - before[::-1].index(str(final))
    assert after == [str(final.parent)]


def test_every_byte_is_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "BLOCK", 1000)
    (tmp_path / "file").write_bytes(bytes(3500))
    before = integrity.record_of(tmp_path / "file")
    assert before.xxh3 == xxhash.xxh3_128_hexdigest(bytes(3500)) and before.size == 3500
    for position in (0, 999, 1000, 3499):
        data = bytearray(3500)
        data[position] = 1
        (tmp_path / "file").write_bytes(data)
        assert integrity.record_of(tmp_path / "file") != before


def test_an_unreadable_checkpoint_does_not_end_the_search(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    record_of = integrity.record_of

    def broken_sector(path):
        if "step_000002" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return record_of(path)

    monkeypatch.setattr(integrity, "record_of", broken_sector)
    monkeypatch.setattr(store, "check_objects", lambda model: None)  # there is no model in them
    assert store.latest_intact(RunFolder(tmp_path)).name == "step_000001"
    with pytest.raises(StorageError, match=r"step_000002/\S+ cannot be read \(Input/output error\)"):
        integrity.intact_manifest(RunFolder(tmp_path).checkpoint(2))


def test_shares_of_the_files_are_all_of_them(tmp_path):
    """Whatever the number of ranks that hash: a damaged file is seen by one of them, and by no other."""
    for i in range(7):
        (tmp_path / f"{i}.distcp").write_bytes(bytes(10 - i))
    files = integrity.records_of(tmp_path, integrity.files_in(tmp_path))
    manifest = Manifest(format="weights", model={}, dtype="float32", files=files)
    for name, shares in itertools.product(files, (1, 2, 3, 9)):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\1" + whole[1:])
        seen = 0
        for share in range(shares):
            try:
                integrity.check_hashes(tmp_path, manifest, share, shares)
            except StorageError as e:
                assert f"{tmp_path / name} is damaged" in str(e)
                seen += 1
        assert seen == 1
        (tmp_path / name).write_bytes(whole)


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    other = write(tmp_path, 3).rename(tmp_path / "checkpoints/step_000009")
    with pytest.raises(StorageError, match=f"{other} is the checkpoint step_000003 under another name: rename it"):
        store.latest(RunFolder(tmp_path))
    other.rename(tmp_path / "elsewhere")
    assert read_manifest(tmp_path / "elsewhere").step == 3


def test_a_file_that_was_made_a_link_is_refused(tmp_path):
    """What it points to may change after it was looked at, and lie on a disk that other nodes do not see."""
    file = write(tmp_path, 1) / "controller.json"
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(StorageError, match="controller.json does not belong to the checkpoint"):
        store.latest(RunFolder(tmp_path))


@pytest.mark.parametrize("stray", ["folder", "link", "linked folder"])
def test_what_does_not_belong_to_it_is_named(tmp_path, stray):
    path = write(tmp_path, 1)
    if stray == "folder":
        (path / "model/stray").mkdir()
    else:
        (path / "model/stray").symlink_to("/etc" if stray == "linked folder" else path / "manifest.json")
    with pytest.raises(StorageError, match="model/stray does not belong to the checkpoint"):
        store.latest(RunFolder(tmp_path))


def test_only_small_files_beside_the_weights_are_taken_along(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_folder, "SMALL", 10)
    hf = tmp_path / "hf"
    (hf / "runs").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "runs/keys.json"):
        (hf / name).write_text("x")
    (hf / "data.jsonl").write_text("x" * 11)
    path = write(tmp_path, 1)
    assert [p.name for p in (path / "hf").iterdir()] == ["config.json"]


def test_of_a_checkpoint_moved_to_another_disk_only_the_link_goes(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    moved, link = tmp_path / "moved", tmp_path / "checkpoints/step_000001"
    link.rename(moved)
    link.symlink_to(moved)
    store.retain(RunFolder(tmp_path), CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step_000002"] and (moved / MANIFEST).exists()
    (tmp_path / "checkpoints/.step_000001.partial").symlink_to(moved)
    store.clean(RunFolder(tmp_path))
    assert names(tmp_path) == ["step_000002"] and (moved / MANIFEST).exists()


def test_one_that_is_half_removed_is_not_found_and_goes_the_next_time(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def killed(path):
        (path / "controller.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(store, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            store.retain(RunFolder(tmp_path), CheckpointConfig(keep_last=1))
    assert store.latest(RunFolder(tmp_path)).name == "step_000002"
    assert [p.name for p in store.published(RunFolder(tmp_path))] == ["step_000002"]
    write(tmp_path, 1)  # the step was done again, before anybody cleaned up
    (tmp_path / "checkpoints/.step_000001.partial/model").mkdir(parents=True)
    store.retain(RunFolder(tmp_path), CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step_000002"]


def test_a_damaged_checkpoint_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints/step_000001" / MANIFEST).write_text("{")
    store.retain(RunFolder(tmp_path), CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_without_any_it_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        store.latest(RunFolder(tmp_path))


def test_the_manifest_comes_back(tmp_path):
    manifest = Manifest(format="weights", model={"layers": 2}, dtype="bfloat16", step=7, layout={"tp": 2})
    (tmp_path / MANIFEST).write_bytes(encode_manifest(manifest))
    got = read_manifest(tmp_path)
    assert msgspec.structs.replace(got, digest="") == manifest and len(got.digest) == 32


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "3"}', '{"schema": 3}', '{"schema": 99}'])
def test_what_is_no_manifest_is_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(StorageError) as e:
        read_manifest(tmp_path)
    assert MANIFEST in str(e.value) and "\n" not in str(e.value)


def test_a_background_call_gives_its_result_or_its_error():
    def fails(error):
        raise error

    assert BackgroundCall("adding", lambda: 1 + 1).result(5) == 2
    with pytest.raises(ConfigError, match="own"):
        BackgroundCall("x", lambda: fails(ConfigError("own"))).result(5)
    for error in (OSError(28, "No space left on device"), KeyError("x"), RuntimeError("y")):
        with pytest.raises(type(error)):
            BackgroundCall("x", lambda error=error: fails(error)).result(5)
    with pytest.raises(StorageError, match="writing takes more than checkpoint.timeout_s=0.1 s"):
        BackgroundCall("writing", lambda: time.sleep(2)).result(0.1)
