"""Trainer ranks on this machine: one child process each, so that each has its own log, exit code and name."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from dapo_megatron.errors import DapoError
from launch.environment import environment_of_rank
from launch.processes import Child, ProcessGroup
from launch.topology import RankPlace


def start_ranks(
    group: ProcessGroup,
    name: str,
    module: str,
    arguments: list[str],
    ranks: Sequence[RankPlace],
    port: int,
    environment: Mapping[str, str],
) -> list[Child]:
    """Start `python -m module arguments` as ranks called <name>-<rank>; `port` is where they meet."""
    command = [sys.executable, "-m", module, *arguments]
    return [
        group.start(f"{name}-{place.rank}", command, environment_of_rank(environment, ranks, place.rank, port))
        for place in ranks
    ]


def wait_for_ranks(ranks: list[Child], what: str, deadline_s: float, check_interrupt: Callable[[], None]) -> None:
    """Wait until ranks that run by themselves (no engine, no controller) have ended well.

    Args:
        what: they do, for errors: "the replay".

    Raises:
        DapoError: one failed, in its own line, or with the end of its log; or it took too long.
    """
    end = time.monotonic() + deadline_s
    while any(rank.process.poll() != 0 for rank in ranks):
        check_interrupt()
        if bad := [rank for rank in ranks if rank.process.poll()]:
            if told := next((line for rank in bad if (line := rank.told())), None):
                raise DapoError(f"{what} failed: {told}")
            raise DapoError(f"{what} failed; the end of {bad[0].log}:\n{bad[0].tail()}")
        if time.monotonic() > end:
            raise DapoError(f"{what} took more than {deadline_s:g} s: see {ranks[0].log}")
        time.sleep(0.1)
