"""Trainer ranks on this machine: one child process each, so that each has its own log, exit code and name.

They meet as torchrun's would, by the environment variables of torch's env:// rendezvous.
"""

import sys

from launch.ports import LOCALHOST
from launch.processes import Child, ProcessGroup


def start_ranks(
    group: ProcessGroup,
    name: str,
    module: str,
    arguments: list[str],
    world: int,
    port: int,
    environment: dict[str, str],
) -> list[Child]:
    """Start `python -m module arguments` as `world` ranks called <name>-<rank>; `port` is where they meet."""
    shared = environment | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", module, *arguments]
    return [
        group.start(f"{name}-{rank}", command, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
