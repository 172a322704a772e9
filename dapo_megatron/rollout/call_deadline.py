"""The deadline of one call of a rollout function, which does not count the waits of its requests for a slot."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Request:
    """One that is under way."""

    waited_s: float = 0.0
    """Seconds from its beginning until it had a slot, known when it ends."""


class CallDeadline:
    """Stands still while requests are under way, which have deadlines of their own, and is put off by their waits."""

    def __init__(self, timeout: asyncio.Timeout):
        """`timeout` is entered."""
        self._timeout, self._due = timeout, timeout.when() or 0.0
        self._under_way, self._excused_until, self._is_over = 0, 0.0, False

    @contextmanager
    def request(self) -> Iterator[Request]:
        """The block is one request."""
        request, began = Request(), asyncio.get_running_loop().time()
        if not self._under_way and began < self._due:  # a late one is cut off
            self._reschedule(None)
        self._under_way += 1
        try:
            yield request
        finally:
            until = began + request.waited_s
            # Those that wait at the same time put it off once.
            self._due += max(0.0, until - max(began, self._excused_until))
            self._excused_until = max(until, self._excused_until)
            self._under_way -= 1
            if not self._under_way:
                self._reschedule(self._due)

    def close(self) -> None:
        """The call is over: a request that outlives it changes nothing."""
        self._is_over = True

    def _reschedule(self, when: float | None) -> None:
        if not self._is_over and not self._timeout.expired():
            self._timeout.reschedule(when)
