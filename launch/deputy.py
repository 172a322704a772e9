"""What puts a job back into the queue when its first node, and with it the launcher, is lost: a step on another node.

With --no-kill SLURM lets the job run on without a batch script until its time limit, and with nobody who watches it.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.errors import exit_code
from dapo_megatron.run_folder import RunFolder
from launch.hosts import HostWatch
from launch.journal import Journal
from launch.requeue import remember
from launch.slurm_calls import slurm

LOOK_S = 1.0


def deputy_command(folder: RunFolder, job: int, launcher_host: str) -> list[str]:
    """argv of a deputy."""
    return [sys.executable, "-m", "launch.deputy", str(folder.path), str(job), launcher_host]


def next_host(hosts: Sequence[str], unfit: set[str]) -> str | None:
    """Where the next deputy runs; None: there is no host but the launcher's, which is the first. Pure."""
    return next((host for host in hosts[1:] if host not in unfit), None)


def main() -> None:
    """Watch until the launcher's host is lost, then put the job back into the queue; a launcher that ends ends this."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("job", type=int)
    parser.add_argument("launcher_host")
    args = parser.parse_args()
    own_host = os.environ["SLURMD_NODENAME"]
    raise SystemExit(exit_code(lambda: watch(RunFolder(args.run_dir), args.job, args.launcher_host, own_host)))


def watch(folder: RunFolder, job: int, launcher_host: str, own_host: str) -> None:
    """Wait for the loss of a host.

    Raises:
        DapoError: SLURM does not put the job back.
    """
    hosts = HostWatch([own_host, launcher_host])
    while launcher_host not in hosts.lost():
        time.sleep(LOOK_S)
    Journal(folder).note(f"{launcher_host} is lost, and the launcher with it -> back into the queue")
    remember(folder, [launcher_host])
    slurm("scontrol", "requeue", str(job))


if __name__ == "__main__":
    main()
