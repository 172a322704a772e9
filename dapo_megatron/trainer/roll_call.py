"""Which trainer ranks did not take part in what failed for the others: each that did says so in their common store.

A rank whose main thread hangs still beats: the launcher takes it for alive, the ranks that waited for it know better.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from dapo_megatron.distributed.agreement import RanksMissing
from dapo_megatron.errors import DapoError
from dapo_megatron.process import read_statuses
from dapo_megatron.run_folder import RunFolder

WAIT_S = 3.0
"""For the others: a deadline ends the wait of all of them at nearly the same moment."""
STORE_S = 1.0
"""That the first rank, whose process may hold the store, stays longer."""
OF_GLOO = ("gloo", "pair closure")
"""What its errors have in common, which are plain RuntimeErrors."""


@contextmanager
def missing_ranks_named(folder: RunFolder) -> Iterator[None]:
    """Make of a failed collective an error that says which ranks were missing, on which host and in which phase.

    Args:
        folder: of the run, where each rank says what it does.

    Raises:
        DapoError: not all ranks took part in a collective.
    """
    try:
        yield
    except (RanksMissing, RuntimeError) as e:
        if not is_of_a_collective(e):
            raise
        what = str(e) if isinstance(e, RanksMissing) else f"a collective failed ({' '.join(str(e).split())[:200]})"
        raise DapoError(f"{what}: {_told(folder, missing_ranks())}") from e


def is_of_a_collective(error: Exception) -> bool:
    """Whether an error says that other ranks are not there."""
    return isinstance(error, RanksMissing | dist.DistError) or any(word in str(error) for word in OF_GLOO)


def missing_ranks() -> list[int]:
    """The ranks that do not come to the roll call within WAIT_S; each that is there calls this once."""
    own, world, end = dist.get_rank(), dist.get_world_size(), time.monotonic() + WAIT_S
    store = dist.distributed_c10d.PrefixStore("roll call", dist.distributed_c10d._get_default_store())
    missing = [rank for rank in range(world) if rank != own]
    with suppress(dist.DistError):  # whoever holds the store is gone
        store.set_timeout(timedelta(seconds=WAIT_S))
        store.set(str(own), "here")
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not store.check([str(rank)])]
            time.sleep(0.1)
    if own == 0:
        time.sleep(STORE_S)
    return missing


def _told(folder: RunFolder, missing: list[int]) -> str:
    if not missing:
        return "all ranks are there: see logs/latest/trainer-*.log"
    at = {status.process: status for status in read_statuses(folder)}
    told = []
    for rank in missing:
        status = at.get(f"trainer-{rank}")
        where = "" if status is None else f" (pid {status.pid} on {status.host}, in phase {status.phase})"
        told.append(f"trainer rank {rank}{where}")
    return f"{', '.join(told)} did not take part, and hangs or is gone"
