"""Train again what a run has kept: trainer ranks alone, no engine and no controller.

a dump of skipped updates    each of their micro-batches alone, to find the one without a finite gradient
dumped batches               step after step, from where the run was before the first of them
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from dapo_megatron.actor.layout_check import check_layout
from dapo_megatron.checkpoint.published import published, step_of
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_config import read_model
from launch.machine import this_machine
from launch.ports import reserved_ports
from launch.processes import ProcessGroup, interruptible
from launch.ranks import start_ranks, wait_for_ranks
from launch.topology import place_ranks

DEADLINE_S = 3600.0
"""For a dump, and for each batch."""
DUMP = "dump.json"
_BATCH = re.compile(r"step_\d+\.msgpack")
Step = dict[str, Any]
"""What dapo_megatron.trainer.replay_batches tells of a step (Replayed)."""


def replay_dump(config: RunConfig, dump: Path) -> str:
    """Run every micro-batch of the skipped updates alone; returns a table to print.

    Raises:
        ConfigError: `dump` is no dump, or the model does not fit the layout.
        DapoError: a rank failed; says why, or has the end of its log.
    """
    if missing := [name for name in (DUMP, "batch.msgpack", "weights") if not (dump / name).exists()]:
        raise ConfigError(
            f"{dump} is no dump of skipped updates ({missing[0]} is missing): give a folder under <run_dir>/dumps"
        )
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "table.txt"
        _run(config, "replay", ["--dump", str(dump), "--out", str(out)], Path(place), DEADLINE_S, lambda: None)
        return out.read_text()


def replay_batches(
    config: RunConfig, batches: Sequence[Path], begin: Path | None, tell: Callable[[Step], None]
) -> None:
    """Train dumped batches one after the other.

    Args:
        begin: checkpoint to begin with; None: the model folder of the config.
        tell: is given each step when it is trained.

    Raises:
        ConfigError: the model does not fit the layout.
        DapoError: a rank failed; says why, or has the end of its log.
    """
    with tempfile.TemporaryDirectory() as place:
        out, told = Path(place) / "steps.jsonl", 0

        def look() -> None:
            nonlocal told
            lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
            for line in lines[told:]:
                tell(msgspec.json.decode(line))
            told = len(lines)

        arguments = [*(["--begin", str(begin)] if begin else []), "--out", str(out), *map(str, batches)]
        _run(config, "replay_batches", arguments, Path(place), DEADLINE_S * len(batches), look)
        look()


def find_batches(target: Path) -> tuple[RunFolder, list[Path]]:
    """The run and the dumped batches, in order, that a file of one batch or a run folder stands for.

    Raises:
        ConfigError: there are none, or one is missing between them.
    """
    if target.is_file() and target.parent.name == "batches" and _BATCH.fullmatch(target.name):
        return RunFolder(target.parents[1]), [target]
    found = sorted(path for path in (target / "batches").glob("step_*.msgpack") if _BATCH.fullmatch(path.name))
    if not found:
        raise ConfigError(
            f"{target} is no dump, no dumped batch and no run that holds batches (a run with "
            "observe.dump_batches=true keeps them)"
        )
    steps = [step_of_batch(path) for path in found]
    if missing := sorted(set(range(steps[0], steps[-1])) - set(steps)):
        raise ConfigError(f"{target} has batches of steps {steps[0]} to {steps[-1]}, but not of step {missing[0]}")
    return RunFolder(target), found


def beginning(folder: RunFolder, step: int) -> Path | None:
    """The checkpoint of the step before; None before step 1, whose beginning is the model folder.

    Raises:
        ConfigError: the run has none.
    """
    if step == 1:
        return None
    for checkpoint in published(folder):
        if step_of(checkpoint) == step - 1:
            return checkpoint
    raise ConfigError(
        f"{folder.checkpoints} has no checkpoint of step {step - 1}, after which batch {step} was trained: say with "
        "--begin=CHECKPOINT what to begin with"
    )


def step_of_batch(path: Path) -> int:
    """The step in the name of a dumped batch."""
    return int(path.stem.removeprefix("step_"))


def line_of(replayed: Step) -> str:
    """A step as a person reads it."""
    metrics, seconds = replayed["metrics"], replayed["seconds"]

    def told(name: str) -> str:
        return "not finite" if metrics[name] is None else f"{metrics[name]:.6g}"

    return (
        f"step {replayed['step']}: loss {told('policy/loss')}, gradient norm {told('optimizer/grad_norm')}, "
        f"{replayed['tokens']} tokens, old log-probs {seconds['old_logprobs']:.2f} s, updates {seconds['update']:.2f} s"
        f"{f', skipped {skipped:.0f}' if (skipped := metrics['optimizer/skipped']) else ''}"
    )


def _run(
    config: RunConfig, module: str, arguments: list[str], folder: Path, deadline_s: float, look: Callable[[], None]
) -> None:
    """Run a module of the trainer on all ranks; `look` is called now and then."""
    check_layout(config, read_model(config.model.path))
    places, recipe = place_ranks(config.actor, [this_machine()]), folder / "config.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    with interruptible() as check_interrupt, reserved_ports(1) as (port,), ProcessGroup(folder) as group:

        def check() -> None:
            check_interrupt()
            look()

        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        arguments = ["--config", str(recipe), *arguments]
        ranks = start_ranks(group, "replay", f"dapo_megatron.trainer.{module}", arguments, places, port, environment)
        wait_for_ranks(ranks, "the replay", deadline_s, check)
