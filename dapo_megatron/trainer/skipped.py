"""The guard against non-finite gradients: every rank skips the update alike, and too many end the run with a dump.

dumps/step_000012/
    dump.json        which updates were skipped, and the sequences of their micro-batches
    batch.msgpack    the step's batch (batching.wire)
    weights/         a checkpoint of the weights, as they were
    config.yaml      the run's configuration
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import yaml

from dapo_megatron.actor.actor import Actor
from dapo_megatron.batching.batch import Shard, StepBatch
from dapo_megatron.batching.wire import Place, cut, encode_part, read_step_batch, write_parts
from dapo_megatron.checkpoint.distributed import save_weights
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import all_agree, gather_on_first_rank, on_first_rank
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError, StorageError
from dapo_megatron.observe import catalog as m
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer.replica_batch import ReplicaBatch

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
    config: RunConfig, actor: Actor, batch: ReplicaBatch, updates: list[dict[str, float]], state: TrainState
) -> DapoError:
    """Keep what is needed to look into the skipped updates; collective.

    Args:
        updates: metrics of the step's updates up to now.
        state: where training stands, the skipped ones counted.

    Returns:
        The error that ends the run.
    """
    folder, layout = RunFolder(Path(config.run_dir)), actor.layout
    path = on_first_rank(
        "choosing a folder for the dump",
        layout,
        lambda: next(p for n in range(1, 10**6) if not (p := folder.dump(batch.step, n)).exists()),
    )
    save_weights(config, actor, state, path / WEIGHTS)
    shards = [batch.shard(i) for i in range(len(batch))]
    skipped = [i for i, update in enumerate(updates) if update[m.SKIPPED]]
    own = {layout.dp_rank: [sources(shards[i]) for i in skipped]} if layout.is_first_of_replica else {}
    found = gather_on_first_rank("collecting the sequences of the skipped updates", own, layout)
    with all_agree(f"writing {path}", layout, may_take_long=True):
        if found is not None:
            of_replica = dict(sorted(pair for some in found for pair in some.items()))
            told = [
                SkippedUpdate(i, str(u[m.GRAD_NORM]), str(u[m.LOSS]), [shard[n] for shard in of_replica.values()])
                for n, (i, u) in enumerate((i, updates[i]) for i in skipped)
            ]
            dump = Dump(batch.step, batch.version, state.skipped, told)
            (path / DUMP).write_bytes(msgspec.json.format(msgspec.json.encode(dump)))
            (path / CONFIG).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    _write_batch(path / BATCH, batch, layout)
    return DapoError(
        f"{state.skipped} updates in a row had a non-finite gradient: lower optimizer.lr, or find the micro-batch with "
        f"dapo-megatron replay {path}"
    )


def sources(shard: Shard) -> list[list[tuple[str, int]]]:
    """(prompt id, sample) of the sequences of each micro-batch."""
    return [[sample.source for sample in micro_batch] for micro_batch in shard]


def _write_batch(path: Path, batch: ReplicaBatch, layout: Layout) -> None:
    """Into one file, the replicas one after the other; collective, after every update's shard was received."""

    def parts() -> Iterator[bytes]:
        for update in range(len(batch)):
            cuts = cut(batch.shard(update))
            for i, part in enumerate(cuts):
                replica = (layout.dp_rank, layout.dp_size)
                yield encode_part(Place(batch.step, batch.version, update, len(batch), *replica, i, len(cuts)), part)

    for replica in range(layout.dp_size):
        with all_agree(f"writing {path}", layout, may_take_long=True):
            if layout.is_first_of_replica and layout.dp_rank == replica:
                write_parts(path, parts(), append=replica > 0)


def read_dump(path: Path) -> tuple[Dump, StepBatch]:
    """The dump in the folder `path`, and the batch of its step.

    Raises:
        StorageError: it is no such folder, or damaged.
    """
    try:
        dump = msgspec.json.decode((path / DUMP).read_bytes(), type=Dump)
        batch = read_step_batch(path / BATCH)
    except (OSError, msgspec.MsgspecError) as e:
        raise StorageError(f"{path} is no dump of skipped updates ({e}): give a folder under <run_dir>/dumps") from None
    if beyond := [u.update for u in dump.updates if not 0 <= u.update < len(batch.mini_batches)]:
        raise StorageError(f"{path / DUMP} names update {beyond[0]}, {BATCH} has {len(batch.mini_batches)}: damaged")
    return dump, batch
