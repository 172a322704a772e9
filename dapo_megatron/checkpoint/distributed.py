"""The actor's distributed checkpoints: weights, optimizer, schedule and random states, saved while training goes on.

    training waits for      a copy of the state: every rank copies about its equal share
    a thread of each rank   writes and hashes its share; when all have, the one of rank 0 completes and publishes it
    `poll`, `finish`        tell training what came of it

The threads meet on a process group of their own, whose deadline is that of the disk.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config

from dapo_megatron.actor.actor import Actor
from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.audit import optimizer_sums, random_sum
from dapo_megatron.checkpoint.background import BackgroundCall
from dapo_megatron.checkpoint.bucket_padding import padding_gathered
from dapo_megatron.checkpoint.crc import without_crc
from dapo_megatron.checkpoint.manifest import MODEL, Audit, Format, Manifest, libraries, model_numbers
from dapo_megatron.checkpoint.random_state import random_states, sharded
from dapo_megatron.checkpoint.safe_metadata import check_common, common_fits, metadata_fits
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.checkpoint.writer import CONFIG, Copy, copy_state, write_copy, write_parts
from dapo_megatron.config import RunConfig
from dapo_megatron.config.changes import config_digest
from dapo_megatron.data.snapshot import cursor_of
from dapo_megatron.distributed.agreement import all_agree, gather_on_first_rank, on_first_rank, sum_over_ranks
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import StorageError
from dapo_megatron.observe import catalog as m
from dapo_megatron.run_folder import RunFolder


class Checkpointer:
    """Writes one checkpoint at a time; every rank holds one, and all methods are collective."""

    def __init__(self, config: RunConfig, actor: Actor):
        self.config, self.actor, self.layout = config, actor, actor.layout
        self.folder = RunFolder(Path(config.run_dir))
        self._saving: BackgroundCall[dict[str, float]] | None = None
        self._late: list[tuple[int, dict[str, float]]] = []
        """(step, metrics) of evaluations that came after their checkpoint was begun."""

    def save(
        self, state: TrainState, controller: bytes, *, format: Format, metrics: dict[str, float] | None = None
    ) -> dict[str, float]:
        """Begin the checkpoint of a finished step, after the one before it is published.

        Args:
            controller: its state that belongs to the step's batch, on rank 0.
            metrics: the evaluation after the step, if there was one.

        Returns:
            Metrics of what is published when this returns (this checkpoint only where it is not asynchronous).

        Raises:
            StorageError: the disk is full or lost; the checkpoint before this one stays valid.
        """
        done, began = self.finish(), time.monotonic()
        audit = Audit(
            optimizer=optimizer_sums(self.actor.optimizer, self.layout),
            rng=random_sum(random_states(), self.layout),
            cursor=on_first_rank(
                "reading the controller's state", self.layout, lambda: cursor_of(controller, state.step)
            ),
        )
        manifest = manifest_of(self.config, self.actor, format, state, audit, metrics or {})
        copy = copy_state(state_of(self.actor, format, is_loading=False), self.layout)
        self._saving = BackgroundCall("saving the checkpoint", lambda: self._save(manifest, copy, controller, began))
        return done if self.config.checkpoint.asynchronous else done | self.finish()

    def poll(self) -> dict[str, float]:
        """Metrics of the checkpoint that was being written, once it is published on all ranks; does not wait."""
        if self._saving is None:
            return {}
        running = torch.tensor(0.0 if self._saving.is_done else 1.0)
        sum_over_ranks("asking for the checkpoint", running, self.layout)
        return {} if running else self.finish()

    def finish(self) -> dict[str, float]:
        """Wait until the checkpoint that is being written is published; returns its metrics."""
        if self._saving is None:
            return {}
        saving, self._saving = self._saving, None
        published = saving.result(self.config.checkpoint.timeout_s)
        self._add_late()
        return published

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The evaluation after a step has come, which may have been saved without it: it is added to the checkpoint,
        once that is published.

        Raises:
            StorageError: the disk is full or lost, or the checkpoint is damaged.
        """
        self._late.append((step, metrics))
        if self._saving is None:
            self._add_late()

    def _add_late(self) -> None:
        late, self._late = self._late, []
        for step, metrics in late:
            with all_agree("adding an evaluation to its checkpoint", self.layout):
                if self.layout.rank == 0:
                    store.add_metrics(self.folder, step, finite(metrics))

    def _save(self, manifest: Manifest, copy: Copy, controller: bytes, began: float) -> dict[str, float]:
        folder, partial = self.folder, self.folder.partial_checkpoint(manifest.step)
        with all_agree("opening the checkpoint", self.layout, in_background=True):
            if self.layout.rank == 0:
                store.open_partial(folder, manifest.step)
        size = write_sealed(self.config, self.layout, copy, manifest, partial, controller, in_background=True)
        with all_agree("publishing the checkpoint", self.layout, in_background=True):
            if self.layout.rank == 0:
                store.publish(folder, manifest.step)
                store.retain(folder, self.config.checkpoint)
        return {m.CHECKPOINT_BYTES: float(size), m.CHECKPOINT_SECONDS: time.monotonic() - began}


def write_sealed(
    config: RunConfig,
    layout: Layout,
    copy: Copy,
    manifest: Manifest,
    path: Path,
    controller: bytes | None,
    *,
    in_background: bool,
) -> int:
    """Write all ranks' copies into the folder `path`, and what goes beside them; collective.

    Returns:
        Bytes of all tensors, on rank 0.
    """
    longer = {"may_take_long": True, "in_background": in_background}
    with all_agree("writing the checkpoint", layout, **longer):
        written = write_copy(copy, path / MODEL, layout.rank)
    parts = gather_on_first_rank("writing the checkpoint", written, layout, **longer)
    with all_agree("completing the checkpoint", layout, **longer):
        if parts is None or copy.metadata is None:
            return 0
        files = write_parts(path / MODEL, copy.metadata, parts)
        store.seal(path, manifest, files, Path(config.model.path), controller)
    return sum(part.size for part in parts)


def save_weights(config: RunConfig, actor: Actor, state: TrainState, path: Path) -> None:
    """Write the weights alone into a new folder `path`, a checkpoint to begin a run with; collective, and waited for.

    Raises:
        StorageError: the disk is full or lost.
    """
    layout = actor.layout
    with all_agree(f"opening {path}", layout, may_take_long=True):
        if layout.rank == 0:
            (path / MODEL).mkdir(parents=True)
    copy = copy_state(state_of(actor, "weights", is_loading=False), layout)
    manifest = manifest_of(config, actor, "weights", state, None, {})
    write_sealed(config, layout, copy, manifest, path, None, in_background=False)


def manifest_of(
    config: RunConfig,
    actor: Actor,
    format: Format,
    state: TrainState,
    audit: Audit | None,
    metrics: dict[str, float],
) -> Manifest:
    """The manifest of what the actor holds now, but for the files."""
    return Manifest(
        format=format,
        step=state.step,
        version=state.version,
        skipped=state.skipped,
        updates=actor.schedule.num_steps,
        model=model_numbers(actor.shape),
        dtype=config.model.dtype,
        layout=actor.layout.sizes,
        config_digest=config_digest(config),
        metrics=finite(metrics),
        audit=audit,
        libraries=libraries(),
    )


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Those that JSON has a number for."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def state_of(actor: Actor, format: Format, *, is_loading: bool, world: int | None = None) -> dict[str, Any]:
    """megatron-core's sharded state dict of what a checkpoint holds.

    Args:
        world: ranks that saved the random states; None: as many as there are. Another number leaves them out.
    """
    metadata = {
        "distrib_optim_sharding_type": format,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(actor.modules)}
    if format == "weights":
        return state
    with padding_gathered(actor.optimizer) if format == "fully_reshardable" else nullcontext():
        state["optimizer"] = actor.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    _zero_padding(state["optimizer"])
    state["schedule"] = actor.schedule.state_dict()
    ranks = dist.get_world_size()
    if world in (None, ranks):
        state["random"] = sharded(random_states(), actor.layout, ranks)
    return state


def _zero_padding(part: Any) -> None:
    """megatron-core leaves the padding of its buckets uninitialised: equal states would not be equal on the disk."""
    if not isinstance(part, dict | list):
        return
    if isinstance(part, dict) and isinstance(mark := part.get("padding"), LocalNonpersistentObject):
        if mark.obj:
            for value in part.values():
                if isinstance(value, ShardedTensor):
                    value.data.zero_()
        return
    for value in part.values() if isinstance(part, dict) else part:
        _zero_padding(value)


def read_state(actor: Actor, path: Path, format: Format, world: int) -> dict[str, Any]:
    """The state dict that a checked distributed checkpoint in `path` holds for this rank; collective.

    Raises:
        StorageError: the files do not hold what a checkpoint of this format has.
    """
    _require_backend(path)
    if format != "weights":
        check_common(path, format)
    state = state_of(actor, format, is_loading=True, world=world)
    with without_crc(), metadata_fits(path, f"a checkpoint of the format {format}"), common_fits(path):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
    return loaded


def _require_backend(path: Path) -> None:
    try:
        found = maybe_load_config(str(path))
    except (ValueError, TypeError, RecursionError):  # no JSON, or not of its fields
        found = None
    if found != CheckpointingConfig("torch_dist", 1):
        raise StorageError(f"{path / CONFIG} is not that of a torch_dist checkpoint: take another one")
