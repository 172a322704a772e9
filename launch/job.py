"""What a job begins with: the run folder made ready, the checkpoint chosen, the configuration written down once."""

import shutil
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

import yaml

from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.integrity import check_files
from dapo_megatron.checkpoint.manifest import MANIFEST, read_manifest, require_model
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.config.changes import Change, changes
from dapo_megatron.errors import ConfigError
from dapo_megatron.keys import make_keys, write_keys
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.process import clear
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_config import read_model

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
    check_new(config, folder, weights)
    store.clean(folder)
    shutil.rmtree(folder.banks, ignore_errors=True)
    folder.begun_with.unlink(missing_ok=True)
    _begin(folder)
    if weights is not None:
        folder.begun_with.write_text(str(weights.resolve()))
    folder.config.write_text(_yaml(config))
    return Job(folder.config, _beginning(folder))


def check_new(config: RunConfig, folder: RunFolder, weights: Path | None) -> None:
    """Whether a new run can begin; nothing is changed.

    Raises:
        ConfigError: the folder holds a run, or cannot be one; `weights` is no checkpoint, or one of another model.
        StorageError: `weights` lacks files.
    """
    nearest = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    if not nearest.is_dir():
        raise not_a_folder(folder)
    if folder.metrics.exists() or store.published(folder):
        raise ConfigError(f"{folder.path} holds a run already: go on with --resume, or choose another run_dir=...")
    if weights is None:
        return
    if not (weights / MANIFEST).exists():
        raise ConfigError(f"{weights} is no checkpoint: give one, such as runs/first/checkpoints/step_000010")
    manifest = read_manifest(weights)
    check_files(weights, manifest)
    require_model(manifest, weights, read_model(config.model.path))


def not_a_folder(folder: RunFolder) -> ConfigError:
    """What is wrong where a file is in the place of the run's folder, or of one above it."""
    return ConfigError(f"run_dir={folder.path} is a file, or lies in one: choose another run_dir=...")


def check_resume(config: RunConfig, folder: RunFolder, resume: Resume) -> None:
    """Whether a run can go on; nothing is changed.

    Raises:
        ConfigError: the folder holds no run; otherwise as prepare_resume.
        StorageError: as prepare_resume.
    """
    require_run(folder)
    began = load_config(folder.config)
    changes(began, config)
    if not store.published(folder):
        _require_young(folder, began)
    elif resume == "latest":
        store.latest(folder)
    else:
        store.latest_intact(folder)


def require_run(folder: RunFolder) -> None:
    """Raise ConfigError where there is nothing to go on from."""
    if not folder.config.exists():
        raise ConfigError(f"{folder.path} holds no run: start it without --resume")


def prepare_resume(config: RunConfig, folder: RunFolder, resume: Resume) -> Job:
    """Choose the checkpoint and make the run folder ready to go on from it; the caller holds its lock.

    A run that was ended before its first checkpoint begins again, with what its rollout bank holds.

    Raises:
        ConfigError: an option changed that must not, or no checkpoint is intact.
        StorageError: the newest checkpoint is damaged, and only it was asked for.
    """
    began = load_config(folder.config)
    found = changes(began, config)
    store.clean(folder)
    if not store.published(folder):
        _require_young(folder, began)
        _begin(folder)
        print("no checkpoint yet: from the beginning", flush=True)
        return Job(_write_config(config, folder, "the beginning", found), _beginning(folder))
    if resume == "latest":
        path = store.latest(folder)
    else:
        path = store.latest_intact(folder)
        for aside in store.set_aside_after(folder, read_manifest(path).step):
            print(f"set aside: {aside}", flush=True)
    _begin(folder)
    print(f"resume from {path}", flush=True)
    return Job(_write_config(config, folder, path.name, found), ["--resume", str(path)])


def prepare_restart(folder: RunFolder, job: Job) -> Job:
    """Controller and trainer begin again, beside the same engines: with their keys, from the newest checkpoint.

    Raises:
        StorageError: it is damaged.
    """
    store.clean(folder)
    clear(folder)
    if not store.published(folder):
        return replace(job, trainer_arguments=_beginning(folder))
    return replace(job, trainer_arguments=["--resume", str(store.latest(folder))])


def _beginning(folder: RunFolder) -> list[str]:
    return ["--weights", folder.begun_with.read_text()] if folder.begun_with.exists() else []


def _begin(folder: RunFolder) -> None:
    clear(folder)
    folder.stop_request.unlink(missing_ok=True)
    folder.save_request.unlink(missing_ok=True)
    write_keys(folder, make_keys())


def _require_young(folder: RunFolder, began: RunConfig) -> None:
    """Raise ConfigError if the run must have had a checkpoint: its records are not given up for want of a disk."""
    steps = [int(record["step"]) for record in read_metrics(folder)]
    aside = sorted(folder.checkpoints.glob(".step_*.damaged"))
    # The first checkpoint is published before the second is begun.
    if aside or (steps and steps[-1] > 2 * began.checkpoint.every):
        raise ConfigError(
            f"{folder.checkpoints} holds no checkpoint, but the run is at step {steps[-1] if steps else 0}: bring them "
            "back, or begin in another run_dir"
        )


def _write_config(config: RunConfig, folder: RunFolder, where: str, found: list[Change]) -> Path:
    """The configuration that holds now: that of the last start, or a new one that says what changed since the first."""
    earlier = list(takewhile(Path.exists, (folder.resumed_config(n) for n in count(1))))
    last = earlier[-1] if earlier else folder.config
    since = changes(load_config(last), config)
    for change in since:
        print(f"changed since the last start: {change}", flush=True)
    if not since:
        return last
    path = folder.resumed_config(len(earlier) + 1)
    told = [f"resumed from {where}, with", *map(str, found)] if found else [f"resumed from {where}, as the run began"]
    head = "".join(f"# {line}\n" for line in told)
    path.write_text(head + _yaml(config))
    return path


def _yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
