"""Train dumped batches again, without engines and controller: to profile, to bisect, to look into a NaN.

    python -m dapo_megatron.trainer.replay_batches --config CONFIG --out FILE [--begin CHECKPOINT] BATCH...

Nothing is pushed, nothing is saved. From where the run was, and in its layout, the metrics are the run's, bit for bit;
with another number of replicas the sequences are spread anew.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.batch import Shard, StepBatch
from dapo_megatron.batching.build import is_spread_for, spread
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.batching.wire import read_step_batch, require_tokens
from dapo_megatron.checkpoint.load import load_checkpoint, load_weights
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.distributed.layout import Layout, init_parallel
from dapo_megatron.errors import DapoError, exit_code
from dapo_megatron.process import leave
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer.loop import train_batch
from dapo_megatron.trainer.replica_batch import ReplicaBatch
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model

FOR_EVER = 10**9
"""Skipped updates in a row that end a replay: it is there to show them."""


class Replayed(msgspec.Struct):
    """One step, as rank 0 tells it: a line of JSON."""

    step: int
    metrics: dict[str, float | None]
    """None: not finite."""
    seconds: dict[str, float]
    """Of each phase."""
    tokens: int
    """Of all sequences of the batch."""


def main() -> int:
    """Replay; 1 after an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.trainer.replay_batches", description=__doc__)
    parser.add_argument("batches", nargs="+", type=Path, help="files under <run_dir>/batches, in order")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--begin", type=Path, help="checkpoint to begin with; default: the model folder of the config")
    parser.add_argument("--out", required=True, type=Path, help="where rank 0 writes a line for each step")
    args = parser.parse_args()
    return exit_code(lambda: _replay(load_config(args.config), args.batches, args.begin, args.out))


def _replay(config: RunConfig, paths: Sequence[Path], begin: Path | None, out: Path) -> None:
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_skipped_updates": FOR_EVER})})
    layout = init_parallel(config)
    actor = Actor(config, read_model(config.model.path), layout)
    state = begin_with(config, actor, begin)
    for path in paths:
        state, replayed = replay_batch(config, actor, state, read_dumped(path, actor.shape))
        if layout.rank == 0:
            with out.open("ab") as file:
                file.write(msgspec.json.encode(replayed) + b"\n")


def read_dumped(path: Path, shape: ModelShape) -> StepBatch:
    """A dumped batch that this model can train.

    Raises:
        DapoError: it is damaged, of another step than its name says, or of a larger vocabulary.
    """
    batch = read_step_batch(path)
    if path.name != (name := RunFolder(path.parents[1]).batch(batch.step).name):
        raise DapoError(f"{path} holds the batch {name}: rename it, or move it away")
    require_tokens(batch, shape.vocab, path)
    return batch


def begin_with(config: RunConfig, actor: Actor, begin: Path | None) -> TrainState:
    """Load what a replay begins with; collective."""
    if begin is None:
        actor.load_hf(config.model.path)
        return TrainState()
    if read_manifest(begin).format == "weights":
        load_weights(actor, begin)
        return TrainState()
    return load_checkpoint(actor, begin)[0]


def replay_batch(config: RunConfig, actor: Actor, state: TrainState, batch: StepBatch) -> tuple[TrainState, Replayed]:
    """Train a dumped batch: where training stands after it, and what was seen. Collective."""
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds[name] = time.monotonic() - began

    mine = own_batch(batch, packing_rules(config), actor.layout)
    state, metrics = train_batch(config, actor, phase, PolicyObjective(config.algorithm), state, mine)
    samples = (s for mini in batch.mini_batches for shard in mini.shards for micro in shard for s in micro)
    replayed = Replayed(batch.step, dict(metrics), seconds, sum(s.length for s in samples))
    return replace(state, step=batch.step, version=state.version + 1), replayed


def own_batch(batch: StepBatch, rules: PackingRules, layout: Layout) -> ReplicaBatch:
    """What this replica trains of a dumped batch."""

    def receive(update: int) -> Shard:
        shards = batch.mini_batches[update].shards
        if not is_spread_for(shards, rules):
            samples = [s for shard in shards for micro_batch in shard for s in micro_batch]
            shards = spread(samples, rules)
        return shards[layout.dp_rank]

    return ReplicaBatch(batch.step, batch.version, len(batch.mini_batches), receive, rules)


if __name__ == "__main__":
    leave(main())
