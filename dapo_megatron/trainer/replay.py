"""Run the skipped updates of a dump again, one micro-batch at a time, to find the one without a finite gradient.

    python -m dapo_megatron.trainer.replay --dump DUMP --config CONFIG --out TABLE

The weights are those of the dump, and so are the old log-probs (algorithm.old_logprobs=actor): every ratio is 1. The
first replica works on the micro-batch, padded as the layout of the replay asks, the others on padding alone.
"""

import argparse
import io
import math
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.packing import pack_shard
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.batching.wire import require_tokens
from dapo_megatron.checkpoint.load import load_weights
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.errors import exit_code
from dapo_megatron.observe import catalog as m
from dapo_megatron.process import leave
from dapo_megatron.trainer.skipped import WEIGHTS, read_dump
from dapo_megatron.weights.hf_config import read_model


@dataclass(frozen=True)
class Row:
    """One micro-batch, alone."""

    update: int
    replica: int
    """Data-parallel rank that had it."""
    micro_batch: int
    loss: float
    grad_norm: float
    sequences: list[tuple[str, int]]
    """(prompt id, sample)."""


def main() -> int:
    """Replay; 1 after an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.trainer.replay", description=__doc__)
    parser.add_argument("--dump", required=True, type=Path, help="folder under <run_dir>/dumps")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="where rank 0 writes the table")
    args = parser.parse_args()
    return exit_code(lambda: _replay(load_config(args.config), args.dump, args.out))


def _replay(config: RunConfig, dump_path: Path, out: Path) -> None:
    dump, batch = read_dump(dump_path)
    layout = init_parallel(config)
    actor = Actor(config, read_model(config.model.path), layout)
    require_tokens(batch, actor.shape.vocab, dump_path)
    load_weights(actor, dump_path / WEIGHTS)
    rules = packing_rules(config)
    rows = [
        replay_micro_batch(config, actor, samples, rules, (skipped.update, replica, i))
        for skipped in dump.updates
        for replica, shard in enumerate(batch.mini_batches[skipped.update].shards)
        for i, samples in enumerate(shard)
    ]
    if layout.rank == 0:
        out.write_text(table_of(rows))


def replay_micro_batch(
    config: RunConfig,
    actor: Actor,
    samples: list[TrainingSample],
    rules: PackingRules,
    place: tuple[int, int, int],
) -> Row:
    """Loss and gradient norm of the micro-batch of `samples`; `place` is its update, replica and number. Collective."""
    own = samples if actor.layout.dp_rank == 0 else []
    shard = pack_shard([own, *([] for _ in range(rules.count_multiple - 1))], rules)
    from_engine = config.algorithm.old_logprobs == "rollout"
    old = [actor.own_column(mb, mb.rollout_logprobs) for mb in shard] if from_engine else None
    metrics = actor.gradients(shard, PolicyObjective(config.algorithm), old)
    return Row(*place, metrics[m.LOSS], metrics[m.GRAD_NORM], [sample.source for sample in samples])


def table_of(rows: list[Row]) -> str:
    """The rows as text, those without a finite gradient marked and counted."""
    table = Table("", "update", "replica", "micro-batch", "loss", "gradient norm", "sequences (prompt id, sample)")
    for row in rows:
        mark = "" if math.isfinite(row.grad_norm) else "!"
        place = (mark, str(row.update), str(row.replica), str(row.micro_batch))
        table.add_row(*place, f"{row.loss:.4g}", f"{row.grad_norm:.4g}", Text(" ".join(map(str, row.sequences))))
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    infinite = sum(not math.isfinite(row.grad_norm) for row in rows)
    return f"{text.getvalue()}{infinite} of {len(rows)} micro-batches have no finite gradient"


if __name__ == "__main__":
    leave(main())
