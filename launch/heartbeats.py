"""Which processes give no sign of life. Pure: it is told the statuses and the time."""

from collections.abc import Iterable

from dapo_megatron.process import Status


class Heartbeats:
    """Remembers when each process's beat last changed, by the watcher's own clock: hosts' clocks differ."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def silent(self, statuses: Iterable[Status], now: float) -> list[tuple[Status, float]]:
        """Processes without a beat for timeout_s, with the seconds since the last one, the longest silence first."""
        found = []
        for status in statuses:
            beat = (status.pid, status.beat)
            before = self._seen.get(status.process)
            if before is None or before[0] != beat:
                self._seen[status.process] = (beat, now)
            elif now - before[1] >= self.timeout_s:
                found.append((status, now - before[1]))
        return sorted(found, key=lambda pair: -pair[1])
