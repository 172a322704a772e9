"""Replay a dump of skipped updates: trainer ranks alone, no engine and no controller."""

import os
import tempfile
import time
from pathlib import Path

import yaml

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError, DapoError
from launch.ports import reserved_ports
from launch.processes import ProcessGroup, interruptible
from launch.ranks import start_ranks

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
    with tempfile.TemporaryDirectory() as place, interruptible() as check_interrupt, reserved_ports(1) as (port,):
        folder = Path(place)
        out, recipe = folder / "table.txt", folder / "config.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        arguments = ["--dump", str(dump), "--config", str(recipe), "--out", str(out)]
        with ProcessGroup(folder) as group:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            module = "dapo_megatron.trainer.replay"
            ranks = start_ranks(group, "replay", module, arguments, config.world_size, port, environment)
            end = time.monotonic() + DEADLINE_S
            while any(rank.process.poll() != 0 for rank in ranks):
                check_interrupt()
                if bad := [rank for rank in ranks if rank.process.poll()]:
                    raise DapoError(f"the replay failed; the end of its log:\n{bad[0].tail()}")
                if time.monotonic() > end:
                    raise DapoError(f"the replay took more than {DEADLINE_S} s")
                time.sleep(0.1)
        return out.read_text()
