"""A cluster's folder names the process that owns it, so that the next one can clear up after a killed one.

/var/tmp/dapo-slurm-<pid>-<when it started>-<number>/inits/<node>    pid of a node's first process, and its start
"""

import os
import shutil
import signal
from pathlib import Path

FOLDERS = Path("/var/tmp")
"""The same on all nodes; and short, as a socket's path must be."""
PREFIX = "dapo-slurm-"


def free_folder() -> Path:
    """A new folder of this process."""
    owner, number = f"{PREFIX}{os.getpid()}-{_started(os.getpid())}", 0
    while True:
        folder = FOLDERS / f"{owner}-{number}"
        try:
            folder.mkdir(mode=0o755)
        except FileExistsError:
            number += 1
        else:
            (folder / "inits").mkdir()
            return folder


def record_init(folder: Path, node: str, pid: int) -> None:
    """Remember the first process of a node."""
    (folder / "inits" / node).write_text(f"{pid} {_started(pid)}")


def remove_abandoned() -> None:
    """End and remove the clusters whose owners are gone."""
    for folder in FOLDERS.glob(f"{PREFIX}*-*-*"):
        pid, started = folder.name.removeprefix(PREFIX).split("-")[:2]
        if _started(int(pid)) == int(started):
            continue
        for init in folder.glob("inits/*"):
            pid, started = init.read_text().split()
            if _started(int(pid)) == int(started):
                os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot, or None: pids are used again."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None
