"""Whatever happens to a checkpoint on the disk: one line that names the file, and nothing of it is loaded."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_checkpoint import controller_at, updates
from tests.tiny import hf_folder, run_config

from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.integrity import intact_manifest, record_of
from dapo_megatron.checkpoint.load import load_checkpoint
from dapo_megatron.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from dapo_megatron.checkpoint.safe_metadata import check_objects, read_metadata
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.errors import ConfigError, DapoError, StorageError
from dapo_megatron.run_folder import RunFolder

SHARD = "model/__0_0.distcp"


def three_checkpoints(config):
    actor = actor_on_rank(config)
    checkpointer = Checkpointer(config, actor)
    for step in (1, 2, 3):
        updates(config, actor, 1)
        checkpointer.save(TrainState(step, step), controller_at(step), format="dp_reshardable")
    checkpointer.finish()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run folder with the checkpoints of three steps, saved by two ranks; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    path = hf_folder(folder / "hf", "qwen3", layers=1)
    config = run_config(path, actor={"data_parallel_size": 2}, checkpoint={"keep_last": 3})
    run_ranks(2, three_checkpoints, config.model_copy(update={"run_dir": str(folder)}))
    return folder, config


@pytest.fixture
def run(original, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(original[0] / "checkpoints", tmp_path / "checkpoints")
    return RunFolder(tmp_path)


def flip(file: Path, position: float, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def exchange(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def rewrite(path: Path, **changes: object) -> None:
    """The manifest with other values, signed anew or not."""
    tree = msgspec.json.decode((path / MANIFEST).read_bytes()) | changes
    (path / MANIFEST).write_bytes(msgspec.json.encode(tree))


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


FILES = ["controller.json", "hf/config.json", "hf/generation_config.json", "manifest.json", "model/.metadata", SHARD]
FILES += ["model/__1_0.distcp", "model/common.pt", "model/metadata.json"]
DAMAGE = {
    **{f"flipped bit {b} at {at} of {f}": (f, lambda p, f=f, at=at, b=b: flip(p / f, at, b)) for f in FILES
       for at, b in ((0.0, 7), (0.3, 0), (0.7, 3), (1.0, 5)) if f != "manifest.json"},
    **{f"flipped bit at {at} of the manifest": (MANIFEST, lambda p, at=at: flip(p / MANIFEST, at))
       for at in (0.1, 0.5, 0.8)},
    **{f"{f} cut": (f, lambda p, f=f: cut(p / f, 40)) for f in FILES},
    **{f"{f} empty": (f, lambda p, f=f: cut(p / f, 0)) for f in FILES},
    **{f"{f} missing": (f, lambda p, f=f: (p / f).unlink()) for f in FILES},
    **{f"{f} of another step": (f, lambda p, f=f: shutil.copy(p.parent / "step_000002" / f, p / f)) for f in FILES
       if f not in ("hf/config.json", "hf/generation_config.json", "model/metadata.json", "model/common.pt", MANIFEST)},
    "manifest of another step": (
        "step_000003", lambda p: shutil.copy(p.parent / "step_000002" / MANIFEST, p / MANIFEST)
    ),
    "two shards exchanged": ("distcp", lambda p: exchange(p / SHARD, p / "model/__1_0.distcp")),
    "step -5": (MANIFEST, lambda p: rewrite(p, step=-5)),
    "version 9": (MANIFEST, lambda p: rewrite(p, version=9)),
    "an older schema": (MANIFEST, lambda p: rewrite(p, schema=2)),
    "brackets in brackets": (MANIFEST, lambda p: (p / MANIFEST).write_text('{"model":' + "[" * 100_000)),
    "a key too many": (MANIFEST, lambda p: rewrite(p, nobody="knows")),
    "a stray file": ("model/__2_0.distcp", lambda p: (p / "model/__2_0.distcp").write_bytes(b"x")),
    "a link to nowhere": ("model/link", lambda p: (p / "model/link").symlink_to("/nowhere")),
    "a renamed folder": ("step_000009", lambda p: p.rename(p.with_name("step_000009"))),
    "a stray folder": ("step_000004_copy", lambda p: shutil.copytree(p, p.with_name("step_000004_copy"))),
    "an empty folder": ("step_000004", lambda p: p.with_name("step_000004").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_that_names_the_file(run, name):
    assert files(run.checkpoint(3)) == FILES
    where, damage = DAMAGE[name]
    damage(run.checkpoint(3))
    with pytest.raises(StorageError) as e:
        intact_manifest(store.latest(run))
    assert where in str(e.value) and "\n" not in str(e.value)
    intact = store.latest_intact(run)
    assert intact.name == ("step_000003" if name in ("a stray folder", "an empty folder") else "step_000002")


def test_nothing_intact_is_said(run):
    for step in (1, 2, 3):
        flip(run.checkpoint(step) / SHARD, 0.5)
    with pytest.raises(ConfigError, match="no intact checkpoint"):
        store.latest_intact(run)


def load_of(config, path):
    actor = actor_on_rank(config)
    before = {name: p.detach().clone() for name, p in actor.modules[0].named_parameters()}
    try:
        load_checkpoint(actor, path)
    except DapoError as e:
        assert all(torch.equal(p, before[name]) for name, p in actor.modules[0].named_parameters())
        return str(e)


def error_of(config, path):
    with pytest.raises(DapoError) as e:
        load_checkpoint(actor_on_rank(config), path)
    return str(e.value)


@pytest.mark.parametrize("shard", [SHARD, "model/__1_0.distcp"])
def test_a_flipped_bit_loads_nothing_and_names_what_is_intact(original, run, shard):
    """Each rank hashes one of the two; both raise."""
    flip(run.checkpoint(3) / shard, 0.4)
    config = original[1].model_copy(update={"run_dir": str(run.path)})
    for message in run_ranks(2, load_of, config, run.checkpoint(3)):
        assert f"{shard} is damaged" in message and "\n" not in message
        assert "step_000002 is the newest intact one, --resume=latest-intact goes on from there" in message


def test_a_manifest_without_parallel_sizes_is_refused(original, run):
    path = run.checkpoint(3)
    manifest = msgspec.structs.replace(read_manifest(path), layout={"tp": 2})
    (path / MANIFEST).write_bytes(encode_manifest(manifest))
    for message in run_ranks(2, load_of, original[1].model_copy(update={"run_dir": str(run.path)}), path):
        assert f"{MANIFEST} has the parallel sizes ['tp'], not ['cp', 'dp', " in message and "\n" not in message


def test_a_moment_that_was_saved_and_is_not_there_is_missed(original, run):
    path = run.checkpoint(3)
    manifest = read_manifest(path)
    audit = msgspec.structs.replace(manifest.audit, optimizer=manifest.audit.optimizer | {"exp_avg_max": 5})
    (path / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, audit=audit)))
    config = original[1].model_copy(update={"run_dir": str(run.path)})
    for message in run_ranks(2, error_of, config, path):
        assert "the optimizer's exp_avg_max did not come back as it was saved" in message


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def signed_anew(path: Path) -> None:
    """What somebody does who may write into the folder: the manifest fits the files again."""
    manifest = read_manifest(path)
    records = {name: record_of(path / name) for name in manifest.files}
    (path / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=records)))


def plant(path: Path, where: str, trap: Path) -> None:
    if where == "model/.metadata":
        data = pickle.loads((path / where).read_bytes())
        data.planner_data = Hostile(trap)
        (path / where).write_bytes(pickle.dumps(data))
    elif where == "model/common.pt":
        torch.save({"optimizer": Hostile(trap)}, path / where)
    else:  # in the place of an object in a shard
        metadata = read_metadata(path / "model")
        index = next(i for i in metadata.storage_data if "param_groups" in i.fqn or "optimizer" in i.fqn)
        index, info = next(
            (i, s) for i, s in metadata.storage_data.items() if s.relative_path == "__0_0.distcp" and "/shard" in i.fqn
        )
        with (path / where).open("r+b") as f:
            f.seek(0, os.SEEK_END)
            start = f.tell()
            torch.save(Hostile(trap), f)
            end = f.tell()
        metadata.storage_data[index] = type(info)(info.relative_path, start, end - start)
        (path / "model/.metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("where", ["model/.metadata", "model/common.pt", SHARD])
def test_a_planted_pickle_does_not_run(original, run, tmp_path, where):
    trap, path = tmp_path / "it_ran", run.checkpoint(3)
    plant(path, where, trap)
    signed_anew(path)
    assert intact_manifest(path).step == 3
    config = original[1].model_copy(update={"run_dir": str(run.path)})
    (message, _) = run_ranks(2, load_of, config, path)
    assert f"{where} is damaged or hostile" in message and not trap.exists()
    assert "step_000002 is the newest intact one" in message


def test_a_shard_outside_the_checkpoint_is_refused(run):
    model = run.checkpoint(3) / "model"
    metadata = read_metadata(model)
    index, info = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = type(info)("../../step_000002/model/__0_0.distcp", info.offset, info.length)
    (model / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(StorageError, match="outside the checkpoint"):
        check_objects(model)


def with_format(path: Path, format: str) -> None:
    (path / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(read_manifest(path), format=format)))


def with_metadata(path: Path, change) -> None:
    metadata = read_metadata(path / "model")
    change(metadata)
    (path / "model/.metadata").write_bytes(pickle.dumps(metadata))


def without(metadata, name: str, *parts: str) -> None:
    """Leave out what `name` is part of, from all, or from some parts of the metadata."""
    for part in parts or ("state_dict_metadata", "storage_data"):
        kept = {k: v for k, v in getattr(metadata, part).items() if name not in getattr(k, "fqn", k)}
        setattr(metadata, part, kept)


def first(entries):
    return next(k for k in entries if getattr(k, "fqn", k).startswith("embedding"))


def elsewhere(metadata, **changes: object) -> None:
    index = first(metadata.storage_data)
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def with_common(path: Path, change) -> None:
    common = torch.load(path / "model/common.pt", weights_only=False)
    change(common)
    torch.save(common, path / "model/common.pt")


METADATA, COMMON, CONFIG = "model/.metadata", "model/common.pt", "model/metadata.json"
CONTRADICTIONS = {
    "another format": (COMMON, lambda p: with_format(p, "fully_reshardable")),
    "no weights": (METADATA, lambda p: with_metadata(p, lambda m: without(m, "decoder"))),
    "no optimizer": (METADATA, lambda p: with_metadata(p, lambda m: without(m, "optimizer"))),
    "no random states": (METADATA, lambda p: with_metadata(p, lambda m: without(m, "random"))),
    "no places": (METADATA, lambda p: with_metadata(p, lambda m: without(m, "decoder", "storage_data"))),
    "nothing": (METADATA, lambda p: with_metadata(p, lambda m: without(m, ""))),
    "places None": (METADATA, lambda p: with_metadata(p, lambda m: setattr(m, "storage_data", None))),
    "tensors None": (METADATA, lambda p: with_metadata(p, lambda m: setattr(m, "state_dict_metadata", None))),
    "a tensor that is a number": (
        METADATA, lambda p: with_metadata(p, lambda m: m.state_dict_metadata.update({first(m.state_dict_metadata): 5}))
    ),
    "another shape": (METADATA, lambda p: with_metadata(
        p, lambda m: setattr(m.state_dict_metadata[first(m.state_dict_metadata)], "size", torch.Size([1, 2, 3])))),
    "a piece less": (METADATA, lambda p: with_metadata(
        p, lambda m: m.state_dict_metadata[first(m.state_dict_metadata)].chunks.pop())),
    "a place beyond the end": (METADATA, lambda p: with_metadata(
        p, lambda m: elsewhere(m, offset=10**9))),
    "a file that is not there": (METADATA, lambda p: with_metadata(
        p, lambda m: elsewhere(m, relative_path="__7_0.distcp"))),
    "a file 5": (METADATA, lambda p: with_metadata(p, lambda m: elsewhere(m, relative_path=5))),
    "the folder above": (METADATA, lambda p: with_metadata(p, lambda m: elsewhere(m, relative_path=".."))),
    "common of weights": (COMMON, lambda p: torch.save({}, p / COMMON)),
    "common that is a list": (COMMON, lambda p: torch.save([1], p / COMMON)),
    "common without a schedule": (COMMON, lambda p: with_common(p, lambda c: c.pop("schedule"))),
    "common of another format": (COMMON, lambda p: with_common(
        p, lambda c: c["optimizer"].update(param_state_sharding_type="fully_reshardable"))),
    "common without a format": (COMMON, lambda p: with_common(p, lambda c: c["optimizer"].clear())),
    "common with groups": (COMMON, lambda p: with_common(
        p, lambda c: c["optimizer"].update(optimizer={"param_groups": []}))),
    "zarr": (CONFIG, lambda p: (p / CONFIG).write_text('{"sharded_backend": "zarr"}')),
    "no JSON": (CONFIG, lambda p: (p / CONFIG).write_text("{")),
    "brackets": (CONFIG, lambda p: (p / CONFIG).write_text("[" * 100_000)),
    "another JSON": (CONFIG, lambda p: (p / CONFIG).write_text("{}")),
}  # fmt: skip


def errors_of(config, folder):
    actor, told = actor_on_rank(config), {}
    for name in CONTRADICTIONS:
        with pytest.raises(StorageError) as e:
            load_checkpoint(actor, RunFolder(folder / name).checkpoint(3))
        told[name] = str(e.value)
    return told


def test_files_that_contradict_the_manifest_are_one_line(original, tmp_path):
    """Signed anew, so that no hash tells."""
    for name, (_, change) in CONTRADICTIONS.items():
        path = RunFolder(tmp_path / name).checkpoint(3)
        shutil.copytree(original[0] / "checkpoints" / "step_000003", path)
        change(path)
        signed_anew(path)
    for told in run_ranks(2, errors_of, original[1], tmp_path):
        for name, (where, _) in CONTRADICTIONS.items():
            assert where in told[name] and "\n" not in told[name] and len(told[name]) < 700, (name, told[name])


def test_half_written_and_half_removed_ones_are_put_in_order(run):
    shutil.copytree(run.checkpoint(3), run.partial_checkpoint(4))
    run.checkpoint(2).rename(run.replaced_checkpoint(2))  # killed between the two renames
    shutil.copytree(run.checkpoint(3), run.replaced_checkpoint(3))  # killed after them
    assert [p.name for p in store.published(run)] == ["step_000001", "step_000003"]
    store.clean(run)
    assert sorted(os.listdir(run.checkpoints)) == ["step_000001", "step_000002", "step_000003"]
    assert store.latest(run) == run.checkpoint(3)


def test_later_checkpoints_are_set_aside_not_lost(run):
    flip(run.checkpoint(3) / SHARD, 0.5)
    assert store.set_aside_after(run, 2) == [run.checkpoints / ".step_000003.damaged"]
    assert store.latest(run) == run.checkpoint(2)
