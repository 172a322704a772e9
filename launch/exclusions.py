"""Which nodes a job that goes back into the queue must not get: a function of what failed and what SLURM says. Pure.

SLURM holds a job for ever that excludes so many nodes that too few are left, or one that it asks for by name: then the
nodes that failed longest ago are not excluded. Counted are only nodes that could replace the job's: of its reservation,
with GPUs as its own have, and with the features that it asks for. What a user excludes stays so, in each group of a
heterogeneous job.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dapo_megatron.errors import DapoError
from launch.allocation import Allocation, by_job

UNFIT = ("down", "drain", "fail", "error", "inval", "future", "unknown")
"""How the names of the states begin in which a node gets no job until somebody has seen to it."""


@dataclass(frozen=True)
class Request:
    """Which nodes the job, or a group of a heterogeneous one, may get."""

    job: str
    """As scontrol is told: of a heterogeneous job 7+1, because 7 stands for all groups."""
    count: int
    """Nodes that it needs."""
    partition: str
    excluded: tuple[str, ...]
    named: tuple[str, ...] = ()
    """Nodes that it must get (--nodelist)."""
    has: tuple[str, ...] = ()
    """Nodes that it has now."""
    gpus: bool = False
    """Whether it has GPUs there."""
    features: str | None = None
    """That it asks for (--constraint)."""
    reservation: str | None = None
    """Of whose nodes alone it may get some."""


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
        text = details.get(group.job_id, "")
        about = re.search(r"^ +ReqNodeList=(\S+) ExcNodeList=(\S+)", text, re.MULTILINE)
        partition = re.search(r"^ +Partition=(\S+)", text, re.MULTILINE)
        if about is None or partition is None:
            raise DapoError(f"scontrol does not show which nodes job {job} may get")
        named, excluded = (() if nodes == "(null)" else tuple(expand(nodes)) for nodes in about.groups())
        found.append(
            Request(
                job,
                len(group.nodes),
                partition[1],
                excluded,
                named,
                has=tuple(node.name for node in group.nodes),
                gpus=any(node.gpus for node in group.nodes),
                features=_given(text, "Features"),
                reservation=_given(text, "Reservation"),
            )
        )
    return found


def _given(text: str, name: str) -> str | None:
    found = re.search(rf"^ +{name}=(\S+)", text, re.MULTILINE)
    return None if found is None or found[1] == "(null)" else found[1]


def by_user(request: Request, added: Sequence[str]) -> Request:
    """The request as the job's user made it, without the nodes that an earlier start of the job `added` to it."""
    return replace(request, excluded=tuple(node for node in request.excluded if node not in added))


def remembered(bad: Mapping[str, float], failed: Sequence[str], now: float) -> dict[str, float]:
    """{node: Unix time of its last failure}, with those that failed now."""
    return {**bad, **dict.fromkeys(failed, now)}


def failed_lately(bad: Mapping[str, float], now: float, forget_s: float) -> list[str]:
    """Nodes whose last failure is not forgotten, the longest ago first."""
    return sorted((node for node, failed in bad.items() if now - failed < forget_s), key=lambda node: bad[node])


def affordable(lately: Sequence[str], requests: Sequence[Request], fit: Mapping[str, Collection[str]]) -> list[str]:
    """Of the nodes that failed lately those that the job can do without.

    Args:
        lately: the longest ago first.
        requests: as the user made them.
        fit: nodes that each request's job can get, now or when others end.
    """
    left = [node for node in lately if all(node not in request.named for request in requests)]
    while left and not _enough(left, requests, fit):
        del left[0]
    return left


def _enough(bad: Sequence[str], requests: Sequence[Request], fit: Mapping[str, Collection[str]]) -> bool:
    may_get = [set(fit[request.job]) - {*request.excluded, *bad} for request in requests]
    each = all(len(nodes) >= request.count for nodes, request in zip(may_get, requests, strict=True))
    return each and len(set().union(*may_get)) >= sum(request.count for request in requests)


def excluded(request: Request, bad: Sequence[str]) -> tuple[str, ...]:
    """What a group must not get: what its user excluded, and `bad` ones."""
    return (*request.excluded, *(node for node in bad if node not in request.excluded))


def fit_nodes(shown: str, request: Request, reserved: Collection[str] | None = None) -> set[str]:
    """Nodes that can get the job; one that does not answer (*) cannot.

    Args:
        shown: `sinfo --Node --format=%N|%T|%f|%G` of its partition.
        reserved: nodes of its reservation, if it has one.
    """
    rows = [line.strip().split("|") for line in shown.splitlines() if "|" in line]
    own = [(features, _gpus(gres)) for name, _, features, gres in rows if name in request.has]
    return {
        name
        for name, state, features, gres in rows
        if not state.startswith(UNFIT)
        and "*" not in state
        and (reserved is None or name in reserved)
        and (not request.gpus or _gpus(gres) in [gpus for _, gpus in own])
        and _has_features(features, request.features, [known for known, _ in own])
    }


def _gpus(gres: str) -> list[str]:
    """gpu:h100:8(S:0-1),shard:16 -> gpu:h100:8"""
    return sorted(re.findall(r"(?:^|,)(gpu[^,(]*)", gres))


def _has_features(features: str, wanted: str | None, own: Sequence[str]) -> bool:
    """Whether a node has what a job asks for; of a choice (|, [], *) that is known of nodes like the job's `own`."""
    if wanted is None:
        return True
    if re.fullmatch(r"[^|\[\]*()]+", wanted):
        return set(re.split("[&,]", wanted)) <= set(features.split(","))
    return features in own


def reserved_nodes(shown: str, expand: Callable[[str], list[str]]) -> list[str]:
    """Nodes of a reservation, from `scontrol show reservation`.

    Raises:
        DapoError: it says none.
    """
    if (nodes := _given(shown, "Nodes")) is None:
        raise DapoError(f"scontrol shows no nodes of the job's reservation: {' '.join(shown.split())[:100]}")
    return expand(nodes)
