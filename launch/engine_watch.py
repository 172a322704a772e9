"""Which engines do not answer: a thread asks each of them, again and again, through its HTTP server and its scheduler.

SGLang's own health check generates a token, which would disturb exact runs and fails while an engine is paused.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from dapo_megatron.engines.engine_set import Member

LOOK_S = 5.0
"""Between questions: an answer takes the engine's scheduler tens of milliseconds on a CPU."""
LOOKS = 12
"""At least so many before an engine counts as silent."""
FIRST_LOOK_S = 0.25
"""Between questions as long as an engine loads: from its first answer on, its silence is noticed sooner."""
ASK_S = 5.0
WORKERS = 16


@dataclass
class _Seen:
    since: float
    """When it last answered, or was first asked, by time.monotonic()."""
    has_answered: bool = False


class EngineWatch:
    """Asks the engines that it was told last, until it is closed."""

    def __init__(self, api_key: str, timeout_s: float, start_timeout_s: float):
        """
        Args:
            api_key: of all engines.
            timeout_s: without an answer, of one that has answered before.
            start_timeout_s: the same of one that has not: it loads its model.
        """
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._look_s = min(LOOK_S, min(timeout_s, start_timeout_s) / LOOKS)
        self._http = httpx.Client(headers={"Authorization": f"Bearer {api_key}"}, timeout=ASK_S)
        self._seen: dict[Member, _Seen] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def follow(self, members: Sequence[Member]) -> None:
        """Ask these from now on."""
        now = time.monotonic()
        self._seen = {member: self._seen.get(member, _Seen(now)) for member in members}

    def silent(self) -> list[tuple[Member, str]]:
        """Those that have not answered for too long, with what is wrong."""
        now, found = time.monotonic(), []
        for member, seen in self._seen.items():
            limit = self._timeout_s if seen.has_answered else self._start_timeout_s
            if now - seen.since >= limit:
                what = "has not answered" if seen.has_answered else "has not begun to answer"
                found.append((member, f"{member.name} ({member.url}) hangs: it {what} for {now - seen.since:.0f} s"))
        return found

    def close(self) -> None:
        """Ask no longer."""
        self._closed.set()

    def _look(self) -> None:
        with ThreadPoolExecutor(WORKERS) as threads, self._http:
            while not self._closed.wait(self._pause_s()):
                list(threads.map(self._ask, list(self._seen.items())))

    def _pause_s(self) -> float:
        has_all_answered = all(seen.has_answered for seen in self._seen.values())
        return self._look_s if has_all_answered else min(self._look_s, FIRST_LOOK_S)

    def _ask(self, watched: tuple[Member, _Seen]) -> None:
        member, seen = watched
        try:
            # Its scheduler has a part in the answer.
            is_well = self._http.get(member.url + "/server_info").status_code == httpx.codes.OK
        except httpx.TransportError:
            return
        if is_well:
            seen.since, seen.has_answered = time.monotonic(), True
