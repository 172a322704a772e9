"""The guard against non-finite gradients: every rank skips the update alike, and too many end the run with a dump.

dumps/step_000012/
    dump.json        which updates were skipped, and the sequences of their micro-batches
    batch.msgpack    the step's batch
    weights/         a checkpoint of the weights, as they were
    config.yaml      the run's configuration
"""

from pathlib import Path

import msgspec
import yaml

from dapo_megatron.actor.actor import Actor
from dapo_megatron.batching.batch import StepBatch
from dapo_megatron.batching.wire import decode_step_batch, encode
from dapo_megatron.checkpoint.distributed import save_weights
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import all_agree, on_first_rank
from dapo_megatron.errors import DapoError, StorageError
from dapo_megatron.observe import catalog as m
from dapo_megatron.run_folder import RunFolder

DUMP, BATCH, WEIGHTS, CONFIG = "dump.json", "batch.msgpack", "weights", "config.yaml"


class SkippedUpdate(msgspec.Struct):
    """One update of the dumped step that was skipped."""

    update: int
    """Number within the step, from 0."""
    grad_norm: str
    """inf or nan: JSON has no number for them."""
    loss: str
    micro_batches: list[list[list[tuple[str, int]]]]
    """[data-parallel rank][i]: (prompt id, sample) of each sequence."""


class Dump(msgspec.Struct):
    """What ended the run."""

    step: int
    version: int
    """Policy version that sampled and was trained."""
    in_a_row: int
    updates: list[SkippedUpdate]


def count_skipped(before: int, update: dict[str, float]) -> int:
    """Non-finite updates in a row, after one more update."""
    return before + 1 if update[m.SKIPPED] else 0


def dump_skipped(
    config: RunConfig, actor: Actor, batch: StepBatch, updates: list[dict[str, float]], state: TrainState
) -> DapoError:
    """Keep what is needed to look into the skipped updates; collective.

    Args:
        updates: metrics of the step's updates up to now.
        state: where training stands, the skipped ones counted.

    Returns:
        The error that ends the run.
    """
    folder = RunFolder(Path(config.run_dir))
    path = on_first_rank(
        "choosing a folder for the dump",
        actor.layout,
        lambda: next(p for n in range(1, 10**6) if not (p := folder.dump(batch.step, n)).exists()),
    )
    save_weights(config, actor, state, path / WEIGHTS)
    with all_agree(f"writing {path}", actor.layout, may_take_long=True):
        if actor.layout.rank == 0:
            dump = Dump(batch.step, batch.version, state.skipped, skipped_updates(batch, updates))
            (path / DUMP).write_bytes(msgspec.json.format(msgspec.json.encode(dump)))
            (path / BATCH).write_bytes(encode(batch))
            (path / CONFIG).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    return DapoError(
        f"{state.skipped} updates in a row had a non-finite gradient: lower optimizer.lr, or find the micro-batch with "
        f"dapo-megatron replay {path}"
    )


def skipped_updates(batch: StepBatch, updates: list[dict[str, float]]) -> list[SkippedUpdate]:
    """Those of the step's updates that were skipped."""
    return [
        SkippedUpdate(i, str(u[m.GRAD_NORM]), str(u[m.LOSS]), [[mb.sequences for mb in shard] for shard in mini.shards])
        for i, (u, mini) in enumerate(zip(updates, batch.mini_batches, strict=False))
        if u[m.SKIPPED]
    ]


def read_dump(path: Path) -> tuple[Dump, StepBatch]:
    """The dump in the folder `path`, and the batch of its step.

    Raises:
        StorageError: it is no such folder, or damaged.
    """
    try:
        dump = msgspec.json.decode((path / DUMP).read_bytes(), type=Dump)
        return dump, decode_step_batch((path / BATCH).read_bytes())
    except (OSError, msgspec.MsgspecError) as e:
        raise StorageError(f"{path} is no dump of skipped updates ({e}): give a folder under <run_dir>/dumps") from None
