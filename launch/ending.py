"""Why SLURM ends a job: its time is over, or it was cancelled or preempted. Signals do not tell, scontrol does."""

import re
from typing import Literal

from dapo_megatron.errors import DapoError
from launch.slurm_calls import slurm

ANSWER_S = 5.0
"""For slurmctld: within KillWait (30 s by default) the run must still be asked to save."""
Ending = Literal["time limit", "cancelled or preempted"]


def ending(job: int) -> Ending | None:
    """Why SLURM ends a job; None: it does not, or cannot be asked now."""
    try:
        return read_ending(slurm("scontrol", "show", "job", str(job), tries=1, call_s=ANSWER_S))
    except DapoError:
        return None


def read_ending(shown: str) -> Ending | None:
    """The same from `scontrol show job`; of a heterogeneous job its first group says it for all. Pure.

    While its processes end a job is COMPLETING, and its reason tells why only of the time limit.
    """
    found = re.search(r"^ +JobState=(\S+) Reason=(\S+)", shown, re.MULTILINE)
    if found is None or found[1] == "RUNNING":
        return None
    return "time limit" if found[2] == "TimeLimit" or "TIMEOUT" in found[1] else "cancelled or preempted"
