"""What a job begins with: the run folder made ready, the checkpoint chosen, the configuration written down once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.integrity import check_files
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.config.changes import Change, changes
from dapo_megatron.errors import ConfigError
from dapo_megatron.keys import make_keys, write_keys
from dapo_megatron.process import clear
from dapo_megatron.run_folder import RunFolder

Resume = Literal["latest", "latest-intact"]
"""From the newest checkpoint, or from the newest that is undamaged."""


@dataclass(frozen=True)
class Job:
    """What the processes of a job are told."""

    config: Path
    """The configuration that holds now, in the run folder."""
    trainer_arguments: list[str]
    """Which checkpoint the trainer begins with."""


def prepare_new(config: RunConfig, folder: RunFolder, weights: Path | None) -> Job:
    """Make the run folder ready for a new run; the caller holds its lock.

    Raises:
        ConfigError: the folder holds a run.
        StorageError: `weights` is no checkpoint, or lacks files.
    """
    if folder.metrics.exists() or store.published(folder):
        raise ConfigError(f"{folder.path} holds a run already: go on with --resume, or choose another run_dir=...")
    if weights is not None:
        check_files(weights, read_manifest(weights))
    store.clean(folder)
    _begin(folder)
    if weights is not None:
        folder.begun_with.write_text(str(weights.resolve()))
    folder.config.write_text(_yaml(config))
    return Job(folder.config, _beginning(folder))


def prepare_resume(config: RunConfig, folder: RunFolder, resume: Resume) -> Job:
    """Choose the checkpoint and make the run folder ready to go on from it; the caller holds its lock.

    A run that was ended before its first checkpoint begins again, with what its rollout bank holds.

    Raises:
        ConfigError: an option changed that must not, or no checkpoint is intact.
        StorageError: the newest checkpoint is damaged, and only it was asked for.
    """
    found = changes(load_config(folder.config), config)
    store.clean(folder)
    if not store.published(folder):
        _begin(folder)
        print("no checkpoint yet: from the beginning", flush=True)
        return Job(_write_changes(config, folder, "the beginning", found), _beginning(folder))
    if resume == "latest":
        path = store.latest(folder)
    else:
        path = store.latest_intact(folder)
        for aside in store.set_aside_after(folder, read_manifest(path).step):
            print(f"set aside: {aside}", flush=True)
    _begin(folder)
    print(f"resume from {path}", flush=True)
    return Job(_write_changes(config, folder, path.name, found), ["--resume", str(path)])


def _beginning(folder: RunFolder) -> list[str]:
    return ["--weights", folder.begun_with.read_text()] if folder.begun_with.exists() else []


def _begin(folder: RunFolder) -> None:
    clear(folder)
    write_keys(folder, make_keys())


def _write_changes(config: RunConfig, folder: RunFolder, where: str, found: list[Change]) -> Path:
    """The configuration that holds now: the run's own, or one beside it that says what it changes."""
    if not found:
        return folder.config
    for change in found:
        print(f"changed since the run began: {change}", flush=True)
    path = next(p for n in range(1, 10**6) if not (p := folder.resumed_config(n)).exists())
    head = "".join(f"# {line}\n" for line in (f"resumed from {where}, with", *map(str, found)))
    path.write_text(head + _yaml(config))
    return path


def _yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
