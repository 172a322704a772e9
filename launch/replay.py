"""Replay a dump of skipped updates: trainer ranks alone, no engine and no controller."""

import os
import tempfile
from pathlib import Path

import yaml

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from launch.machine import this_machine
from launch.ports import reserved_ports
from launch.processes import ProcessGroup, interruptible
from launch.ranks import start_ranks, wait_for_ranks
from launch.topology import place_ranks

DEADLINE_S = 3600


def replay(config: RunConfig, dump: Path) -> str:
    """Run every micro-batch of the skipped updates alone; returns a table to print.

    Raises:
        ConfigError: `dump` is no dump.
        DapoError: a rank failed; with the end of its log.
    """
    if missing := [name for name in ("dump.json", "batch.msgpack", "weights") if not (dump / name).exists()]:
        raise ConfigError(
            f"{dump} is no dump of skipped updates ({missing[0]} is missing): give a folder under <run_dir>/dumps"
        )
    places = place_ranks(config.actor, [this_machine()])
    with tempfile.TemporaryDirectory() as place, interruptible() as check_interrupt, reserved_ports(1) as (port,):
        folder = Path(place)
        out, recipe = folder / "table.txt", folder / "config.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        arguments = ["--dump", str(dump), "--config", str(recipe), "--out", str(out)]
        with ProcessGroup(folder) as group:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            module = "dapo_megatron.trainer.replay"
            ranks = start_ranks(group, "replay", module, arguments, places, port, environment)
            wait_for_ranks(ranks, "the replay", DEADLINE_S, check_interrupt)
        return out.read_text()
