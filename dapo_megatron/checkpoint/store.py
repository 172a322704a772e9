"""Checkpoints in a run folder: written aside, published by one rename, found again by name.

checkpoints/step_000010/
    model/             megatron-core distributed checkpoint: weights, optimizer, schedule
    controller.msgpack controller state that belongs to the step's batch
    manifest.json      what was saved, for the comparison on resume
"""

import os
import shutil
from pathlib import Path

import msgspec

from dapo_megatron.errors import ConfigError
from dapo_megatron.run_folder import RunFolder

MANIFEST = "manifest.json"
CONTROLLER = "controller.msgpack"
MODEL = "model"
SCHEMA = 2


class Manifest(msgspec.Struct):
    """What a checkpoint holds."""

    step: int
    version: int
    """Policy version that was live."""
    skipped: int
    """Updates skipped in a row, up to then."""
    updates: int
    """Optimizer updates done; the schedule's position."""
    architecture: str
    layout: dict[str, int]
    """Parallel sizes it was saved under; it can be loaded under any other."""
    schema: int = SCHEMA


def published(folder: RunFolder) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.checkpoints.glob("step_*") if (p / MANIFEST).exists())


def latest(folder: RunFolder) -> Path:
    """The newest complete checkpoint.

    Raises:
        ConfigError: there is none.
    """
    found = published(folder)
    if not found:
        raise ConfigError(f"{folder.checkpoints} holds no complete checkpoint: start the run without --resume")
    return found[-1]


def controller_state(path: Path) -> bytes:
    """The controller's state that a checkpoint holds."""
    return (path / CONTROLLER).read_bytes()


def read_manifest(path: Path) -> Manifest:
    """The manifest of one checkpoint.

    Raises:
        ConfigError: it is unreadable or of another schema.
    """
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(f"{path / MANIFEST} cannot be read ({e}): resume from another checkpoint") from None
    if manifest.schema != SCHEMA:
        raise ConfigError(f"{path} has checkpoint schema {manifest.schema}, this program reads {SCHEMA}")
    return manifest


def open_partial(folder: RunFolder, step: int) -> Path:
    """An empty folder beside the final one; what an interrupted save left there is removed."""
    partial = folder.partial_checkpoint(step)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / MODEL).mkdir(parents=True)
    return partial


def publish(folder: RunFolder, manifest: Manifest, controller: bytes, keep: int) -> Path:
    """Complete a partial checkpoint, rename it into place and remove the oldest beyond `keep`."""
    partial, final = folder.partial_checkpoint(manifest.step), folder.checkpoint(manifest.step)
    _write_synced(partial / CONTROLLER, controller)
    _write_synced(partial / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
    if final.exists():
        # Only a resumed run writes a step again; the old one makes way first, and the partial one is complete.
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync_folder(final.parent)
    for old in published(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
