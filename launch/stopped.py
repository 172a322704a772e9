"""Children that are stopped (SIGSTOP), with all they have started: engines have no heartbeat of ours."""

import psutil

from dapo_megatron.errors import DapoError
from launch.processes import Child, ProcessGroup


class Stopped:
    """Remembers since when each process has been stopped."""

    def __init__(self, group: ProcessGroup, timeout_s: float):
        self._group, self._timeout_s = group, timeout_s
        self._since: dict[int, float] = {}

    def check(self, now: float) -> None:
        """Look at every process.

        Raises:
            DapoError: one has been stopped for longer than the deadline.
        """
        stopped = {p.pid: child for child in self._group.children for p in _tree(child) if _is_stopped(p)}
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        for pid, since in self._since.items():
            if now - since >= self._timeout_s:
                raise DapoError(
                    f"{stopped[pid].name} (process {pid} on this host) hangs: it has been stopped for "
                    f"{now - since:.0f} s; see {stopped[pid].log}"
                )


def _tree(child: Child) -> list[psutil.Process]:
    try:
        process = psutil.Process(child.process.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
