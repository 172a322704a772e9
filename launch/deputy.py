"""What puts a job back into the queue when its first node, and with it the launcher, is lost: a step on another node.

With --no-kill SLURM lets the job run on without a batch script until its time limit, and with nobody who watches it. A
deputy whose node was cut off may outlive its job, and must not put back what has ended or is another attempt.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.errors import DapoError, exit_code
from dapo_megatron.run_folder import RunFolder
from launch.hosts import nodes_of
from launch.journal import Journal
from launch.requeue import count_failure, remember
from launch.slurm_calls import slurm

LOOK_S = 5.0


def deputy_command(folder: RunFolder, job: int, restarts: int, launcher_host: str) -> list[str]:
    """argv of a deputy, for the attempt of a job that comes after so many restarts."""
    return [sys.executable, "-m", "launch.deputy", str(folder.path), str(job), str(restarts), launcher_host]


def next_host(hosts: Sequence[str], unfit: set[str]) -> str | None:
    """Where the next deputy runs; None: there is no host but the launcher's, which is the first. Pure."""
    return next((host for host in hosts[1:] if host not in unfit), None)


def main() -> None:
    """Watch until the launcher's host is lost, then put the job back into the queue; ends with the job's attempt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("job", type=int)
    parser.add_argument("restarts", type=int)
    parser.add_argument("launcher_host")
    args = parser.parse_args()
    raise SystemExit(exit_code(lambda: watch(RunFolder(args.run_dir), args.job, args.restarts, args.launcher_host)))


def watch(folder: RunFolder, job: int, restarts: int, launcher_host: str) -> None:
    """Wait until SLURM calls a host down, and put the job back, if this attempt of it still runs.

    Raises:
        DapoError: SLURM does not put the job back (--no-requeue): it is cancelled, because nobody watches it.
    """
    while not _is_down(launcher_host):
        if _is_over(job, restarts):
            return
        time.sleep(LOOK_S)
    if _is_over(job, restarts):
        return
    Journal(folder).note(f"{launcher_host} is lost, and the launcher with it -> back into the queue")
    remember(folder, [launcher_host])
    count_failure(folder, job)
    try:
        slurm("scontrol", "requeue", str(job))
    except DapoError as e:
        if _is_over(job, restarts):  # it is back, and slurmctld's answer was lost
            return
        Journal(folder).note(f"{e} -> the job is cancelled")
        slurm("scancel", str(job))
        raise


def is_running(shown: str, restarts: int) -> bool:
    """Whether `scontrol show job` tells of a job that runs, after so many restarts. Pure."""
    words = shown.split()
    return "JobState=RUNNING" in words and f"Restarts={restarts}" in words


def _is_over(job: int, restarts: int) -> bool:
    try:
        return not is_running(slurm("scontrol", "--oneliner", "show", "job", str(job), tries=1), restarts)
    except DapoError as e:
        return "Invalid job id" in str(e)  # SLURM forgets a job after some minutes


def _is_down(host: str) -> bool:
    # SLURM's word alone: a deputy whose own network is cut must not take the launcher for lost.
    try:
        return nodes_of(slurm("scontrol", "--oneliner", "show", "node", host, tries=1))[host].is_down
    except DapoError:  # slurmctld may be away for a while
        return False


if __name__ == "__main__":
    main()
