"""Trainer ranks on this machine: one child process each, so that each has its own log, exit code and name.

They meet as torchrun's would, by the environment variables of torch's env:// rendezvous.
"""

import sys
import time
from collections.abc import Callable

from dapo_megatron.errors import DapoError
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


def wait_for_ranks(ranks: list[Child], what: str, deadline_s: float, check_interrupt: Callable[[], None]) -> None:
    """Wait until ranks that run by themselves (no engine, no controller) have ended well.

    Args:
        what: they do, for errors: "the replay".

    Raises:
        DapoError: one failed, with the end of its log; or it took too long.
    """
    end = time.monotonic() + deadline_s
    while any(rank.process.poll() != 0 for rank in ranks):
        check_interrupt()
        if bad := [rank for rank in ranks if rank.process.poll()]:
            raise DapoError(f"{what} failed; the end of {bad[0].log}:\n{bad[0].tail()}")
        if time.monotonic() > end:
            raise DapoError(f"{what} took more than {deadline_s:g} s: see {ranks[0].log}")
        time.sleep(0.1)
