"""Restoring an actor: nothing is loaded that is damaged or hostile, and what did not come back is an error."""

from math import prod
from pathlib import Path
from typing import Any

import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.audit import optimizer_sums, random_sum
from dapo_megatron.checkpoint.distributed import read_state
from dapo_megatron.checkpoint.integrity import check_files, check_hashes
from dapo_megatron.checkpoint.manifest import MANIFEST, MODEL, Manifest, read_manifest, require_model
from dapo_megatron.checkpoint.random_state import random_states, set_random_states
from dapo_megatron.checkpoint.regrouping import regrouped
from dapo_megatron.checkpoint.safe_metadata import check_objects
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.data.snapshot import cursor_of
from dapo_megatron.distributed.agreement import all_agree, on_first_rank
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import ConfigError, DapoError, StorageError
from dapo_megatron.run_folder import RunFolder

FRESH = "take an older checkpoint, or start a new run from the weights with --resume-weights-only"


def load_checkpoint(actor: Actor, path: Path) -> tuple[TrainState, bytes]:
    """Restore weights, optimizer, schedule and random states; collective over all ranks.

    Returns:
        Where training stood, and on rank 0 the controller's state (elsewhere it is empty).

    Raises:
        StorageError: a file is damaged; names it, and the newest intact checkpoint.
        ConfigError: it is of another model, or of a format that this layout cannot load.
        DapoError: something did not come back as it was saved.
    """
    manifest = checked_manifest(actor.layout, path)
    if manifest.format == "weights" or manifest.audit is None:
        raise ConfigError(f"{path} holds weights alone: start a run from them with --resume-weights-only={path}")
    require_loadable(manifest, path, actor)
    with all_agree("reading the controller's state", actor.layout, may_take_long=True):
        controller = checked_controller(path, manifest) if actor.layout.rank == 0 else b""
    world = prod(manifest.layout[name] for name in ("tp", "pp", "cp", "dp"))
    loaded = read_state(actor, path / MODEL, manifest.format, world)
    for i, module in enumerate(actor.modules):
        module.load_state_dict(loaded[f"model{i}"])
    _load_optimizer(actor, loaded["optimizer"])
    actor.schedule.load_state_dict(loaded["schedule"])
    if "random" in loaded:
        set_random_states({name: state[0] for name, state in loaded["random"].items()})
    audit_actor(actor, manifest, path)
    return TrainState(manifest.step, manifest.version, manifest.skipped), controller


def _load_optimizer(actor: Actor, state: dict[Any, Any]) -> None:
    """Moments and steps; what the configuration sets (learning rate, betas, ...) stays as it says now."""
    ours = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in actor.optimizer.param_groups]
    with torch.no_grad():  # float32 masters are views of the parameters
        parts = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
        actor.optimizer.load_state_dict(regrouped(state, [part.param_groups for part in parts]))
    for group, settings in zip(actor.optimizer.param_groups, ours, strict=True):
        group.update(settings)


def load_weights(actor: Actor, path: Path) -> None:
    """Set the weights alone, from a checkpoint of any format; everything else is as in a new run. Collective."""
    manifest = checked_manifest(actor.layout, path)
    require_model(manifest, path, actor.shape)
    loaded = read_state(actor, path / MODEL, "weights", 0)
    for i, module in enumerate(actor.modules):
        module.load_state_dict(loaded[f"model{i}"])
    actor.optimizer.reload_model_params()


def checked_manifest(layout: Layout, path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are those that were written and hold no code; collective.

    Every rank hashes its share of the files.
    """
    try:
        with all_agree("checking the checkpoint", layout, may_take_long=True):
            manifest = read_manifest(path)
            check_files(path, manifest)
            check_hashes(path, manifest, layout.rank, layout.world_size)
            check_objects(path / MODEL)
    except StorageError as e:
        message, folder = str(e), RunFolder(path.parent.parent)
        if path.parent != folder.checkpoints:
            raise
        hinted = on_first_rank(
            "looking for an intact checkpoint",
            layout,
            lambda: str(store.with_intact(StorageError(message), folder)),
            may_take_long=True,
        )
        raise StorageError(hinted) from None
    return manifest


def checked_controller(path: Path, manifest: Manifest) -> bytes:
    """The controller's state, which stands where the manifest says."""
    controller, saved = store.controller_state(path), manifest.audit and manifest.audit.cursor
    if (cursor := cursor_of(controller, manifest.step)) != saved:
        raise DapoError(f"{path}: {store.CONTROLLER} holds {cursor}, {saved} was saved; {FRESH}")
    return controller


def require_loadable(manifest: Manifest, path: Path, actor: Actor) -> None:
    """Raise unless this layout can load the checkpoint's optimizer state.

    Raises:
        ConfigError: it cannot, or the checkpoint is of another model.
        StorageError: the manifest does not say.
    """
    require_model(manifest, path, actor.shape)
    saved, ours = manifest.layout, actor.layout.sizes
    if saved.keys() != ours.keys():
        raise StorageError(f"{path / MANIFEST} has the parallel sizes {sorted(saved)}, not {sorted(ours)}; {FRESH}")
    fixed = [name for name in ours if name != "dp" and saved[name] != ours[name]]
    if manifest.format == "dp_reshardable" and fixed:
        raise ConfigError(
            f"{path} is dp_reshardable, saved with {_sizes(saved, fixed)}, the run has {_sizes(ours, fixed)}: resume "
            f"with the saved sizes, or from a fully_reshardable checkpoint{_fully_reshardable(path)}"
        )


def audit_actor(actor: Actor, manifest: Manifest, path: Path) -> None:
    """Compare what came back with the manifest; collective.

    Raises:
        DapoError: names the first difference.
    """
    assert manifest.audit is not None
    if actor.schedule.num_steps != manifest.updates:
        raise DapoError(
            f"{path}: the schedule came back at update {actor.schedule.num_steps}, the manifest says "
            f"{manifest.updates}; {FRESH}"
        )
    found, saved = optimizer_sums(actor.optimizer, actor.layout), manifest.audit.optimizer
    for name in sorted(found.keys() | saved.keys()):
        if found.get(name) != saved.get(name):
            raise DapoError(f"{path}: the optimizer's {name} did not come back as it was saved; {FRESH}")
    if actor.layout.sizes == manifest.layout and random_sum(random_states(), actor.layout) != manifest.audit.rng:
        raise DapoError(f"{path}: the random states did not come back as they were saved; {FRESH}")


def _sizes(layout: dict[str, int], names: list[str]) -> str:
    return ", ".join(f"{name}={layout[name]}" for name in names)


def _fully_reshardable(path: Path) -> str:
    for other in reversed(store.published(RunFolder(path.parent.parent))):
        try:
            if read_manifest(other).format == "fully_reshardable":
                return f" such as {other.name}"
        except StorageError:
            continue
    return ""
