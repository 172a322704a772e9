"""A job goes back into the queue, without the nodes that failed it; they are forgotten after a while."""

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence

import msgspec

from dapo_megatron.errors import DapoError
from dapo_megatron.run_folder import RunFolder
from launch.allocation import Allocation
from launch.slurm_calls import slurm
from launch.states import Requeue

REQUEUED_S = 120.0
"""For SLURM to end this script after it has put the job back."""


def requeue(allocation: Allocation, folder: RunFolder, end: Requeue, forget_s: float) -> None:
    """Put the job back into the queue, and wait for SLURM to end this script.

    Raises:
        DapoError: SLURM refuses, or does not end it.
    """
    job = str(allocation.job_id)
    # SLURM ends this script as soon as it is told, and takes a list of nodes only of a job that waits.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = _excluded(job)
    bad = remember(folder, end.exclude)
    nodes = excluded(before, bad, time.time(), forget_s)
    slurm("scontrol", "requeue", job)
    ends = time.monotonic() + REQUEUED_S
    while nodes != before and not _exclude(job, nodes) and time.monotonic() < ends:
        time.sleep(0.5)
    time.sleep(max(0.0, ends - time.monotonic()))
    raise DapoError(f"SLURM has put job {job} back, and has not ended it for {REQUEUED_S:.0f} s")


def remember(folder: RunFolder, failed: Sequence[str]) -> dict[str, float]:
    """Write down that nodes have failed; returns {node: Unix time of its last failure} of all that ever did."""
    bad = remembered(_read(folder), failed, time.time())
    aside = folder.bad_nodes.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(bad))
    os.replace(aside, folder.bad_nodes)
    return bad


def remembered(bad: Mapping[str, float], failed: Sequence[str], now: float) -> dict[str, float]:
    """{node: Unix time of its last failure}, with those that failed now. Pure."""
    return {**bad, **dict.fromkeys(failed, now)}


def excluded(before: Sequence[str], bad: Mapping[str, float], now: float, forget_s: float) -> list[str]:
    """Nodes that the job must not get: what its user excluded, and those that failed it lately. Pure.

    Args:
        before: what it was not to get so far.
        bad: when each node that failed it did so for the last time.
    """
    by_user = [node for node in before if node not in bad]
    return by_user + [node for node, failed in bad.items() if now - failed < forget_s]


def _excluded(job: str) -> list[str]:
    found = re.search(r"\bExcNodeList=(\S+)", slurm("scontrol", "show", "job", job))
    if found is None or found[1] == "(null)":
        return []
    return slurm("scontrol", "show", "hostnames", found[1]).split()


def _exclude(job: str, nodes: Sequence[str]) -> bool:
    try:
        slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}", tries=1)
    except DapoError:  # it is not back in the queue yet
        return False
    return True


def _read(folder: RunFolder) -> dict[str, float]:
    if not folder.bad_nodes.exists():
        return {}
    return msgspec.json.decode(folder.bad_nodes.read_bytes(), type=dict[str, float])
