"""A job goes back into the queue, without the nodes that failed it; they are forgotten after a while."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from dapo_megatron.errors import DapoError, Preempted
from dapo_megatron.run_folder import RunFolder
from launch.allocation import Allocation, host_names
from launch.ending import read_ending
from launch.exclusions import (
    Request,
    affordable,
    by_user,
    excluded,
    failed_lately,
    fit_nodes,
    read_requests,
    remembered,
    reserved_nodes,
)
from launch.journal import Journal
from launch.slurm_calls import slurm
from launch.states import Requeue

REQUEUED_S = 120.0
"""For SLURM to end this script after it has put the job back."""
T = TypeVar("T")


class Requeues(msgspec.Struct):
    """How a job went back into the queue so far."""

    failures: int = 0
    """Those that count against launch.max_requeues."""
    added: dict[str, list[str]] = {}
    """Nodes that each group excludes beside those that its user does, by Request.job."""


def requeue(allocation: Allocation, folder: RunFolder, end: Requeue, forget_s: float) -> None:
    """Put the job back into the queue, and wait for SLURM to end this script.

    Raises:
        Preempted: it was cancelled, or preempted, meanwhile.
        DapoError: SLURM refuses, or does not end it.
    """
    # SLURM ends this script as soon as it is told, and takes a list of nodes only of a job that waits.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = allocation.job_id
    bad = remember(folder, end.exclude)
    shown = slurm("scontrol", "show", "job", str(job))
    if read_ending(shown) == "cancelled or preempted":
        raise Preempted(f"job {job} was cancelled or preempted while it ended: it is not put back from here")
    before = read_requests(allocation, shown, host_names)
    earlier = _read(folder, folder.requeues(job), Requeues)
    requests = [by_user(request, earlier.added.get(request.job, [])) for request in before]
    failed = _affordable(folder, failed_lately(bad, time.time(), forget_s), requests)
    lists = {request.job: excluded(request, failed) for request in requests}
    added = {r.job: sorted(set(lists[r.job]) - set(r.excluded)) for r in requests}
    _write(folder.requeues(job), Requeues(earlier.failures + end.is_failure, added))
    waiting = [request.job for request in before if set(lists[request.job]) != set(request.excluded)]
    slurm("scontrol", "requeue", str(job))
    ends = time.monotonic() + REQUEUED_S
    while (waiting := [w for w in waiting if not _exclude(w, lists[w])]) and time.monotonic() < ends:
        time.sleep(0.5)
    time.sleep(max(0.0, ends - time.monotonic()))
    raise DapoError(f"SLURM has put job {job} back, and has not ended it for {REQUEUED_S:.0f} s")


def failures(folder: RunFolder, job: int) -> int:
    """How often a job went back into the queue after a failure; who preempted it, or a time limit, is none."""
    return _read(folder, folder.requeues(job), Requeues).failures


def count_failure(folder: RunFolder, job: int) -> None:
    """Write down that a job goes back into the queue after a failure."""
    earlier = _read(folder, folder.requeues(job), Requeues)
    _write(folder.requeues(job), msgspec.structs.replace(earlier, failures=earlier.failures + 1))


def remember(folder: RunFolder, failed: Sequence[str]) -> dict[str, float]:
    """Write down that nodes have failed; returns {node: Unix time of its last failure} of all that ever did."""
    bad = remembered(_read(folder, folder.bad_nodes, dict[str, float]), failed, time.time())
    _write(folder.bad_nodes, bad)
    return bad


def _affordable(folder: RunFolder, lately: Sequence[str], requests: Sequence[Request]) -> list[str]:
    """Those that the job can do without; launcher.log tells of the others."""
    if not lately:
        return []
    try:
        fit = {r.job: fit_nodes(_nodes_of(r.partition), r, _reserved(r)) for r in requests}
    except DapoError as e:  # better on any nodes than held for ever, or not at all
        Journal(folder).note(f"{', '.join(lately)} failed, and not excluded: {e}")
        return []
    found = affordable(lately, requests, fit)
    if spared := [node for node in lately if node not in found]:
        Journal(folder).note(f"{', '.join(spared)} failed, and not excluded: too few nodes would be left for the job")
    return found


def _nodes_of(partition: str) -> str:
    return slurm("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T|%f|%G")


def _reserved(request: Request) -> list[str] | None:
    if request.reservation is None:
        return None
    return reserved_nodes(slurm("scontrol", "show", "reservation", request.reservation), host_names)


def _exclude(job: str, nodes: Sequence[str]) -> bool:
    try:
        slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}", tries=1)
    except DapoError:  # it is not back in the queue yet
        return False
    return True


def _read(folder: RunFolder, path: Path, kind: type[T]) -> T:
    """What a file holds; nothing where it is not there."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return kind()
    except msgspec.MsgspecError as e:
        Journal(folder).note(f"{path} cannot be read ({e}): earlier failures are forgotten")
        return kind()


def _write(path: Path, what: object) -> None:
    aside = path.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(what))
    os.replace(aside, path)
