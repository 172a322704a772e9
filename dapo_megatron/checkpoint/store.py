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

from dapo_megatron.errors import DapoError

MANIFEST = "manifest.json"
SCHEMA = 1


class Manifest(msgspec.Struct):
    """What a checkpoint holds."""

    step: int
    version: int
    updates: int
    """Optimizer updates done; the schedule's position."""
    architecture: str
    layout: dict[str, int]
    """Parallel sizes it was saved under; it can be loaded under any other."""
    schema: int = SCHEMA


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def published(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*") if (p / MANIFEST).exists())


def latest(run_dir: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        DapoError: there is none.
    """
    found = published(run_dir)
    if not found:
        raise DapoError(f"{run_dir}/checkpoints holds no complete checkpoint: start the run without --resume")
    return found[-1]


def read_manifest(path: Path) -> Manifest:
    """The manifest of one checkpoint.

    Raises:
        DapoError: it is unreadable or of another schema.
    """
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as e:
        raise DapoError(f"{path / MANIFEST} cannot be read ({e}): resume from another checkpoint") from None
    if manifest.schema != SCHEMA:
        raise DapoError(f"{path} has checkpoint schema {manifest.schema}, this program reads {SCHEMA}")
    return manifest


def open_partial(run_dir: Path, step: int) -> Path:
    """An empty folder beside the final one; what an interrupted save left there is removed."""
    partial = checkpoint_path(run_dir, step).with_name(f".step_{step:06d}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "model").mkdir(parents=True)
    return partial


def publish(partial: Path, run_dir: Path, manifest: Manifest, controller: bytes, keep: int) -> Path:
    """Complete a partial checkpoint, rename it into place and remove the oldest beyond `keep`."""
    _write_synced(partial / "controller.msgpack", controller)
    _write_synced(partial / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
    final = checkpoint_path(run_dir, manifest.step)
    if final.exists():
        # Only a resumed run writes a step again; the old one makes way first, and the partial one is complete.
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync_folder(final.parent)
    for old in published(run_dir)[:-keep]:
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
