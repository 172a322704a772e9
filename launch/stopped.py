"""Children that are stopped (SIGSTOP), with all they have started: engines have no heartbeat of ours."""

from collections.abc import Sequence

import psutil

from launch.processes import Child, tree


class Stopped:
    """Remembers since when each process has been stopped."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._since: dict[int, float] = {}

    def look(self, children: Sequence[Child], now: float) -> list[tuple[Child, str]]:
        """Those that have been stopped for longer than the deadline, with one line each."""
        stopped = {p.pid: child for child in children for p in tree(child) if _is_stopped(p)}
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        return [
            (
                stopped[pid],
                f"{stopped[pid].name} (process {pid} on this host) hangs: it has been stopped for {now - since:.0f} s; "
                f"see {stopped[pid].log}",
            )
            for pid, since in self._since.items()
            if now - since >= self._timeout_s
        ]


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
