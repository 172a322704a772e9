"""One task of a SLURM step becomes one process of a job: `srun ... python -m launch.task STEP_FILE`.

A step's file lists its processes by task number. What a process needs is added to its node's environment; of GPUs, the
numbers are those that the job sees there. It may open as many files as its node lets it.
"""

import os
import resource
import sys
from pathlib import Path

import msgspec

from launch.environment import VISIBLE, interface_environment, visible_devices
from launch.network import interface_towards


class Task(msgspec.Struct):
    """One process."""

    arguments: list[str]
    environment: dict[str, str]
    """What is set in it, beside what the node's processes have."""
    devices: list[int] | None
    """Of the GPUs that the job sees on the node; None: nobody has any, also where the node shows some."""
    towards: str | None
    """Address of the host towards which gloo and NCCL choose their interface; None: it is in the environment."""


def write_step(path: Path, tasks: list[Task]) -> None:
    """Write a step's file, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(tasks))
    os.replace(aside, path)


def main() -> None:
    """Become the process of this task."""
    tasks = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Task])
    task = tasks[int(os.environ["SLURM_PROCID"])]
    environment = os.environ | task.environment
    environment[VISIBLE] = visible_devices(task.devices or (), os.environ.get(VISIBLE))
    if task.towards is not None:
        environment |= interface_environment(interface_towards(task.towards))
    # The launcher's limit comes along only where SLURM's PropagateResourceLimits lets it.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.execvpe(task.arguments[0], task.arguments, environment)


if __name__ == "__main__":
    main()
