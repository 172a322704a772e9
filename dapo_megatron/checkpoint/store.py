"""Checkpoints in a run folder: written aside, published by one rename, found again by name.

checkpoints/step_000010/
    model/             megatron-core distributed checkpoint: weights, optimizer, schedule, random states
    hf/                the model's config, tokenizer, ...: what a Hugging Face folder holds beside weights
    controller.json    controller state that belongs to the step's batch
    manifest.json      what the others are, with their hashes; written last

Names that begin with a dot are no checkpoints: .step_000010.partial is being written (or was when somebody pulled the
plug), .step_000010.replaced makes way for a step that was done again, .step_000010.damaged was set aside by a resume,
.step_000010.manifest is about to replace the checkpoint's own.
"""

import os
import shutil
from pathlib import Path

import msgspec

from dapo_megatron.checkpoint.integrity import check_files, intact_manifest, records_of
from dapo_megatron.checkpoint.manifest import HF, MANIFEST, MODEL, FileRecord, Manifest, encode_manifest, read_manifest
from dapo_megatron.checkpoint.published import PUBLISHED
from dapo_megatron.checkpoint.published import published as published
from dapo_megatron.checkpoint.published import step_of as step_of
from dapo_megatron.checkpoint.retention import kept_steps
from dapo_megatron.checkpoint.safe_metadata import check_objects
from dapo_megatron.config import CheckpointConfig
from dapo_megatron.errors import ConfigError, StorageError
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_folder import side_files

CONTROLLER = "controller.json"


def latest(folder: RunFolder) -> Path:
    """The newest checkpoint, whose manifest, file names and sizes are in order.

    Raises:
        ConfigError: there is none.
        StorageError: it is damaged, or the folder holds something else; names the newest intact one.
    """
    strangers = [p for p in _visible(folder) if not PUBLISHED.fullmatch(p.name)]
    try:
        if strangers:
            raise StorageError(f"{strangers[0]} is not a checkpoint of this run: move it away")
        path = _newest(folder)
        check_files(path, read_manifest(path))
    except StorageError as e:
        raise with_intact(e, folder) from None
    return path


def latest_intact(folder: RunFolder) -> Path:
    """The newest checkpoint all of whose hashes are right, and whose objects are plain data.

    Raises:
        ConfigError: there is none.
    """
    for path in reversed(published(folder)):
        try:
            intact_manifest(path)
            check_objects(path / MODEL)
        except (StorageError, OSError):  # a sector that cannot be read, too
            continue
        return path
    raise ConfigError(f"{folder.checkpoints} holds no intact checkpoint: start a new run, in another run_dir")


def controller_state(path: Path) -> bytes:
    """The controller's state that a checkpoint holds (data.snapshot)."""
    return (path / CONTROLLER).read_bytes()


def with_intact(error: StorageError, folder: RunFolder) -> StorageError:
    """The same error, with what can be done about it."""
    try:
        hint = f"{latest_intact(folder).name} is the newest intact one, --resume=latest-intact goes on from there"
    except ConfigError:
        hint = f"no checkpoint in {folder.checkpoints} is intact"
    return StorageError(f"{error}; {hint}")


def open_partial(folder: RunFolder, step: int) -> Path:
    """An empty folder beside the final one; what an interrupted save left there is removed."""
    partial = folder.partial_checkpoint(step)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / MODEL).mkdir(parents=True)
    return partial


def seal(
    path: Path,
    manifest: Manifest,
    model_files: dict[str, FileRecord],
    hf: Path,
    controller: bytes | None = None,
) -> None:
    """Add to a checkpoint, whose model is written, what goes beside it; the manifest last, through to the disk.

    Args:
        manifest: all but the files.
        model_files: of the distributed checkpoint, by path in its folder.
        hf: the model's Hugging Face folder; of what lies in it, nothing is taken that is deeper or large.
    """
    names = side_files(hf, nested=False)
    copy_files(hf, names, path / HF)
    beside = [f"{HF}/{name}" for name in names]
    if controller is not None:
        write_synced(path / CONTROLLER, controller)
        beside.append(CONTROLLER)
    files = {f"{MODEL}/{name}": record for name, record in model_files.items()} | records_of(path, beside)
    write_synced(path / MANIFEST, encode_manifest(msgspec.structs.replace(manifest, files=files)))
    for place in (path / MODEL, path / HF, path):
        sync_folder(place)


def publish(folder: RunFolder, step: int) -> Path:
    """Rename the sealed partial checkpoint of a step into place."""
    partial, final = folder.partial_checkpoint(step), folder.checkpoint(step)
    replaced = folder.replaced_checkpoint(step)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def add_metrics(folder: RunFolder, step: int, metrics: dict[str, float]) -> None:
    """Add an evaluation to the manifest of a step's checkpoint, in one rename; nothing where there is none.

    Raises:
        StorageError: the manifest is damaged.
    """
    path = folder.checkpoint(step)
    if not path.exists():
        return
    manifest = read_manifest(path)
    aside = path.with_name(f".{path.name}.manifest")
    write_synced(aside, encode_manifest(msgspec.structs.replace(manifest, metrics=manifest.metrics | metrics)))
    aside.replace(path / MANIFEST)
    sync_folder(path)


def retain(folder: RunFolder, config: CheckpointConfig) -> None:
    """Remove the checkpoints that need not be kept; a damaged one stays, to be looked at."""
    manifests = {}
    for path in published(folder):
        try:
            manifests[path] = read_manifest(path)
        except StorageError:
            continue
    kept = kept_steps(list(manifests.values()), config)
    for path, manifest in manifests.items():
        if manifest.step not in kept:
            # Renamed first: a checkpoint that is half removed must not be found.
            going = path.with_name(f".{path.name}.partial")
            shutil.rmtree(going, ignore_errors=True)
            path.rename(going)
            _remove(going)


def clean(folder: RunFolder) -> None:
    """Put in order what an interrupted save left; only the process that owns the run folder calls this."""
    for path in folder.checkpoints.glob(".step_*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        _remove(path) if final.exists() else path.rename(final)
    for path in folder.checkpoints.glob(".step_*.partial"):
        _remove(path)
    for path in folder.checkpoints.glob(".step_*.manifest"):
        path.unlink()


def set_aside_after(folder: RunFolder, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than the one that the run goes on from; returns their new places."""
    moved = []
    for path in published(folder):
        if step_of(path) > step:
            aside = path.with_name(f".{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def copy_files(source: Path, names: list[str], target: Path) -> None:
    """Copy files byte for byte, with the folders that they are in."""
    target.mkdir(exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(target / name, (source / name).read_bytes())


def write_synced(path: Path, data: bytes) -> None:
    """Write a file through to the disk."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(path: Path) -> None:
    """Write the names in a folder through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint's folder, or the link to one that somebody moved to another disk; that one stays."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _visible(folder: RunFolder) -> list[Path]:
    return sorted(p for p in folder.checkpoints.glob("*") if not p.name.startswith("."))


def _newest(folder: RunFolder) -> Path:
    found = published(folder)
    if not found:
        raise ConfigError(f"{folder.checkpoints} holds no complete checkpoint")
    return found[-1]
