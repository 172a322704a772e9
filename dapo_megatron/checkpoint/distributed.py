"""The actor's distributed checkpoints: weights, optimizer, schedule and random states, saved while training goes on.

save    copies the state                              every rank, about its equal share; all that training waits for
                writes and hashes the copy                    a thread of every rank
poll    when all have written, completes and publishes a thread of rank 0; `finish` waits for it
load    hashes, then audits what came back            every rank
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from torch.distributed.checkpoint.metadata import Metadata

from dapo_megatron.actor.actor import Actor
from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.audit import optimizer_sums, random_sum
from dapo_megatron.checkpoint.background import BackgroundCall
from dapo_megatron.checkpoint.cursor import cursor_of
from dapo_megatron.checkpoint.manifest import Audit, Format, Manifest, libraries, model_numbers
from dapo_megatron.checkpoint.random_state import random_states, sharded
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.checkpoint.writer import Written, copy_state, write_copy, write_metadata
from dapo_megatron.config import RunConfig
from dapo_megatron.config.changes import config_digest
from dapo_megatron.distributed.agreement import all_agree, sum_over_ranks
from dapo_megatron.observe import catalog as m
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_folder import companions


class Checkpointer:
    """Writes one checkpoint at a time; every rank holds one, and all methods are collective."""

    def __init__(self, config: RunConfig, actor: Actor):
        self.config, self.actor, self.layout = config, actor, actor.layout
        self.folder = RunFolder(Path(config.run_dir))
        self._saving: _Saving | None = None

    def save(
        self, state: TrainState, controller: bytes, *, format: Format, metrics: dict[str, float] | None = None
    ) -> dict[str, float]:
        """Begin the checkpoint of a finished step, after the one before it is published.

        Args:
            controller: the state that came with the step's batch.
            metrics: the evaluation after the step, if there was one.

        Returns:
            Metrics of the checkpoints that are published when this returns (all of them unless asynchronous).

        Raises:
            StorageError: the disk is full or lost; the checkpoint before this one stays valid.
        """
        done, began = self.finish(), time.monotonic()
        with all_agree("opening the checkpoint", self.layout, may_take_long=True):
            if self.layout.rank == 0:
                store.open_partial(self.folder, state.step)
        manifest = self._manifest(state, controller, metrics or {}, format)
        copy = copy_state(state_of(self.actor, format, is_loading=False), self.layout)
        path, rank = self.folder.partial_checkpoint(state.step) / store.MODEL, self.layout.rank
        written = BackgroundCall("writing the checkpoint", lambda: write_copy(copy, path, rank))
        self._saving = _Saving(manifest, controller, copy.metadata, written, began)
        return done if self.config.checkpoint.asynchronous else done | self.finish()

    def poll(self) -> dict[str, float]:
        """Take the checkpoint that is being written one stage on, if every rank is ready for it, without waiting.

        Returns:
            Its metrics, when it is published.
        """
        if self._saving is None:
            return {}
        running = torch.tensor(0.0 if self._saving.is_ready else 1.0)
        sum_over_ranks("asking for the checkpoint", running, self.layout)
        return {} if running else self._advance(self._saving)

    def finish(self) -> dict[str, float]:
        """Wait until the checkpoint that is being written is published; returns its metrics."""
        metrics: dict[str, float] = {}
        while self._saving is not None:
            metrics = self._advance(self._saving)
        return metrics

    def _advance(self, saving: "_Saving") -> dict[str, float]:
        limit_s, layout = self.config.checkpoint.timeout_s, self.layout
        self._saving = None
        if saving.published is None:
            with all_agree("writing the checkpoint", layout, may_take_long=True):
                written = saving.written.result(limit_s)
            parts: list[Any] | None = [None] * layout.world_size if layout.rank == 0 else None
            dist.gather_object(written, parts, dst=0, group=layout.waiting)
            published = BackgroundCall("publishing the checkpoint", lambda: self._publish(saving, parts))
            self._saving = replace(saving, published=published)
            return {}
        with all_agree("publishing the checkpoint", layout, may_take_long=True):
            size = saving.published.result(limit_s)
        return {m.CHECKPOINT_BYTES: float(size), m.CHECKPOINT_SECONDS: time.monotonic() - saving.began}

    def _publish(self, saving: "_Saving", parts: list[Written] | None) -> int:
        """On rank 0, complete the checkpoint of which all `parts` are written; returns its bytes."""
        if parts is None or saving.metadata is None:
            return 0
        partial = self.folder.partial_checkpoint(saving.manifest.step)
        files = write_metadata(partial / store.MODEL, saving.metadata, [part.results for part in parts])
        for part in parts:
            files |= part.files
        store.complete(self.folder, saving.manifest, files, saving.controller, companions(self.config.model.path))
        store.retain(self.folder, self.config.checkpoint)
        return sum(part.size for part in parts)

    def _manifest(self, state: TrainState, controller: bytes, metrics: dict[str, float], format: Format) -> Manifest:
        actor, layout = self.actor, self.layout
        audit = Audit(
            optimizer=optimizer_sums(actor.optimizer, layout),
            rng=random_sum(random_states(), layout),
            cursor=cursor_of(controller),
        )
        return Manifest(
            format=format,
            step=state.step,
            version=state.version,
            skipped=state.skipped,
            updates=actor.schedule.num_steps,
            model=model_numbers(actor.shape),
            dtype=self.config.model.dtype,
            layout=layout.sizes,
            config_digest=config_digest(self.config),
            metrics=metrics,
            audit=audit,
            libraries=libraries(),
        )


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is on its way to the disk."""

    manifest: Manifest
    """As it will be, but for its files."""
    controller: bytes
    metadata: Metadata | None
    """Of all ranks' parts, on rank 0."""
    written: BackgroundCall[Written]
    began: float
    published: BackgroundCall[int] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether this rank has nothing to wait for."""
        return (self.published or self.written).is_done


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
    state["optimizer"] = actor.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    state["schedule"] = actor.schedule.state_dict()
    ranks = dist.get_world_size()
    if world in (None, ranks):
        state["random"] = sharded(random_states(), actor.layout, ranks)
    return state


def read_state(actor: Actor, path: Path, format: Format, world: int) -> dict[str, Any]:
    """The state dict that a checked distributed checkpoint in `path` holds for this rank."""
    loaded: dict[str, Any] = dist_checkpointing.load(state_of(actor, format, is_loading=True, world=world), str(path))
    return loaded
