"""Which nodes a job that goes back into the queue must not get: a function of what failed and what SLURM says. Pure.

What a user excludes stays so, in each group of a heterogeneous job.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dapo_megatron.errors import DapoError
from launch.allocation import Allocation, by_job


@dataclass(frozen=True)
class Request:
    """Which nodes the job, or a group of a heterogeneous one, may get."""

    job: str
    """As scontrol is told: of a heterogeneous job 7+1, because 7 stands for all groups."""
    excluded: tuple[str, ...]


def read_requests(allocation: Allocation, shown: str, expand: Callable[[str], list[str]]) -> list[Request]:
    """The requests of a job's groups, in their order.

    Args:
        shown: `scontrol show job`.
        expand: launch.allocation.host_names.

    Raises:
        DapoError: `shown` is of another job.
    """
    details, found = by_job(shown), []
    for i, group in enumerate(allocation.groups):
        job = f"{allocation.job_id}+{i}" if allocation.is_heterogeneous else str(allocation.job_id)
        about = re.search(r"\bExcNodeList=(\S+)", details.get(group.job_id, ""), re.MULTILINE)
        if about is None:
            raise DapoError(f"scontrol does not show which nodes job {job} may get")
        found.append(Request(job, () if about[1] == "(null)" else tuple(expand(about[1]))))
    return found


def by_user(request: Request, added: Sequence[str]) -> Request:
    """The request as the job's user made it, without the nodes that an earlier start of the job `added` to it."""
    return replace(request, excluded=tuple(node for node in request.excluded if node not in added))


def remembered(bad: Mapping[str, float], failed: Sequence[str], now: float) -> dict[str, float]:
    """{node: Unix time of its last failure}, with those that failed now."""
    return {**bad, **dict.fromkeys(failed, now)}


def failed_lately(bad: Mapping[str, float], now: float, forget_s: float) -> list[str]:
    """Nodes whose last failure is not forgotten, the longest ago first."""
    return sorted((node for node, failed in bad.items() if now - failed < forget_s), key=lambda node: bad[node])


def excluded(request: Request, bad: Sequence[str]) -> tuple[str, ...]:
    """What a group must not get: what its user excluded, and `bad` ones."""
    return (*request.excluded, *(node for node in bad if node not in request.excluded))
