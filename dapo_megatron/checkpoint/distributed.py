"""The actor's distributed checkpoint: weights, optimizer and schedule, loadable under any layout."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron.actor.actor import Actor
from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import all_agree
from dapo_megatron.errors import ConfigError, DapoError, StorageError
from dapo_megatron.run_folder import RunFolder


def save_checkpoint(config: RunConfig, actor: Actor, state: TrainState, controller: bytes) -> None:
    """Write and publish the checkpoint of a finished step; collective over all ranks.

    Args:
        controller: the state that came with the step's batch (used on rank 0).

    Raises:
        StorageError: the disk is full or lost; the checkpoint before this one stays valid.
    """
    folder, layout = RunFolder(Path(config.run_dir)), actor.layout
    with all_agree("opening the checkpoint", layout, may_take_long=True):
        if layout.rank == 0:
            store.open_partial(folder, state.step)
    with all_agree("writing the checkpoint", layout, may_take_long=True):
        _write(actor, folder.partial_checkpoint(state.step) / store.MODEL)
    with all_agree("publishing the checkpoint", layout, may_take_long=True):
        if layout.rank == 0:
            manifest = store.Manifest(
                step=state.step,
                version=state.version,
                skipped=state.skipped,
                updates=actor.schedule.num_steps,
                architecture=actor.shape.family.architecture,
                layout={
                    "tp": layout.tp_size,
                    "pp": layout.pp_size,
                    "cp": layout.cp_size,
                    "ep": layout.ep_size,
                    "dp": layout.dp_size,
                },
            )
            store.publish(folder, manifest, controller, config.trainer.keep_checkpoints)


def _write(actor: Actor, path: Path) -> None:
    try:
        dist_checkpointing.save(_state(actor, is_loading=False), str(path), ("torch_dist", 1))
    except CheckpointException as e:  # what torch makes of a disk that is full or gone
        reason = " ".join(str(e).split())
        raise StorageError(f"{path} cannot be written ({reason[-300:]}): make room on the disk of the run") from None


def load_checkpoint(actor: Actor, path: Path) -> tuple[TrainState, bytes]:
    """Restore weights, optimizer and schedule; collective over all ranks.

    Returns:
        Where training stood, and the controller's state.

    Raises:
        DapoError: it is of another model, its experts were spread and are not now (or the reverse), or the schedule
            that came back is not the manifest's.
    """
    manifest = store.read_manifest(path)
    if manifest.architecture != actor.shape.family.architecture:
        raise ConfigError(f"{path} holds a {manifest.architecture}, the run is for a {actor.shape.family.architecture}")
    if (manifest.layout.get("ep", 1) > 1) != (actor.layout.ep_size > 1):
        # megatron-core keeps spread experts in an optimizer of their own, whose state has another structure.
        raise ConfigError(
            f"{path} was saved with actor.expert_model_parallel_size={manifest.layout.get('ep', 1)}, the run has "
            f"{actor.layout.ep_size}: keep it at 1, or above 1"
        )
    loaded = dist_checkpointing.load(_state(actor, is_loading=True), str(path / store.MODEL))
    for i, module in enumerate(actor.modules):
        module.load_state_dict(loaded[f"model{i}"])
    actor.optimizer.load_state_dict(loaded["optimizer"])
    actor.schedule.load_state_dict(loaded["schedule"])
    if actor.schedule.num_steps != manifest.updates:
        raise DapoError(
            f"{path}: the schedule came back at update {actor.schedule.num_steps}, the manifest says {manifest.updates}"
        )
    return TrainState(manifest.step, manifest.version, manifest.skipped), store.controller_state(path)


def _state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    state = {f"model{i}": m.sharded_state_dict(metadata=metadata) for i, m in enumerate(actor.modules)}
    state["optimizer"] = actor.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    state["schedule"] = actor.schedule.state_dict()
    return state
