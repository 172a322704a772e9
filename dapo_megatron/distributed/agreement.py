"""All ranks agree on an outcome: a failure on one of them is the same error on all, instead of a hang.

The error names the rank that failed and its host. A rank that never comes to the agreement is noticed by the
deadline of the group, and named by trainer/roll_call.py.
"""

import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError, Kind, error_of_kind, told

T = TypeVar("T")


class RanksMissing(DapoError):
    """Not every rank came to an agreement."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank; travels to the others."""

    rank: int
    host: str
    kind: Kind
    message: str

    def error(self, what: str) -> DapoError:
        """The error that every rank raises."""
        return error_of_kind(self.kind, f"{what} failed on trainer rank {self.rank} ({self.host}): {self.message}")


@contextmanager
def all_agree(what: str, layout: Layout, *, may_take_long: bool = False, in_background: bool = False) -> Iterator[None]:
    """Run a phase on every rank, then let all know whether it failed on one of them.

    Args:
        may_take_long: wait for each other as long as for a batch, not as long as for a collective.
        in_background: among the threads that write a checkpoint, as long as for a disk.

    Raises:
        DapoError: of the first rank that failed, on every rank; or not all ranks came within the deadline.
    """
    failure = None
    try:
        yield
    except Exception as e:
        if not in_background and not isinstance(e, DapoError | OSError):
            raise
        # In a thread nobody else would hear of it, and the others would wait as long as for a disk.
        failure = _failure(e, layout)
    failures: list[Failure | None] = [None] * dist.get_world_size()
    group, limit = _group(layout, may_take_long, in_background)
    with _deadline(what, limit):
        dist.all_gather_object(failures, failure, group=group)
    for found in failures:
        if found is not None:
            raise found.error(what)


def on_first_rank(what: str, layout: Layout, call: Callable[[], T], *, may_take_long: bool = False) -> T:
    """Rank 0 calls; every rank gets the result, or raises its error.

    Args:
        call: made on rank 0 alone; its result must be picklable.
        may_take_long: wait as long as for a batch, not as long as for a collective.

    Raises:
        DapoError: the call failed, or rank 0 did not come back within the deadline.
    """
    outcome: list[T | Failure | None] = [None]
    if layout.rank == 0:
        try:
            outcome[0] = call()
        except (DapoError, OSError) as e:
            outcome[0] = _failure(e, layout)
    group, limit = _group(layout, may_take_long)
    with _deadline(what, limit):
        dist.broadcast_object_list(outcome, src=0, group=group)
    (found,) = outcome
    if isinstance(found, Failure):
        raise found.error(what)
    return found  # type: ignore[return-value]  # rank 0 has set it


def share_in_replica(data: bytes, layout: Layout) -> bytes | memoryview:
    """The bytes that the first rank of each replica has, on all its ranks; as a tensor, not through pickle."""
    if len(layout.replica_ranks) == 1:
        return data
    first = layout.replica_ranks[0]
    size = torch.tensor(len(data))
    with _deadline("sharing the batch", layout.deadlines.collective):
        dist.broadcast(size, src=first, group=layout.replica)
        flat = torch.empty(int(size), dtype=torch.uint8)
        if layout.is_first_of_replica:
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(flat, src=first, group=layout.replica)
    return flat.numpy().data


def gather_on_first_rank(
    what: str, value: T, layout: Layout, *, may_take_long: bool = False, in_background: bool = False
) -> list[T] | None:
    """Every rank's (picklable) value, in rank order, on rank 0; None on the others. Arguments as for all_agree."""
    values: list[T | None] | None = [None] * dist.get_world_size() if layout.rank == 0 else None
    group, limit = _group(layout, may_take_long, in_background)
    with _deadline(what, limit):
        dist.gather_object(value, values, dst=0, group=group)
    return values  # type: ignore[return-value]  # every place is filled


def sum_over_ranks(what: str, values: torch.Tensor, layout: Layout) -> None:
    """Add up a CPU tensor over all ranks, in place."""
    with _deadline(what, layout.deadlines.collective):
        dist.all_reduce(values, group=layout.control)


def _group(layout: Layout, may_take_long: bool, in_background: bool = False) -> tuple[dist.ProcessGroup, float]:
    """(group, its deadline in seconds)."""
    if in_background:
        return layout.saving, layout.deadlines.saving
    if may_take_long:
        return layout.waiting, layout.deadlines.waiting
    return layout.control, layout.deadlines.collective


def _failure(error: Exception, layout: Layout) -> Failure:
    line = told(error)
    if line is None and isinstance(error, OSError):
        raise error
    if line is None:
        traceback.print_exception(error)
        line = DapoError(" ".join(traceback.format_exception_only(error)[-1].split())[:500])
    return Failure(layout.rank, socket.gethostname(), line.kind, str(line))


@contextmanager
def _deadline(what: str, limit_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # what gloo raises at its deadline and for a lost peer
        reason = " ".join(str(e).split())[:200]
        raise RanksMissing(
            f"{what}: not every trainer rank came to the agreement within {limit_s:.0f} s ({reason})"
        ) from None
