"""Names under which an engine caches prefixes: who gives another name shares no keys and values.

Where a push does not flush the cache (resharding.in_flight=keep_kv), later requests must not find what an earlier
policy left in it. So requests for one input share a name only while some of them are in flight.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class CacheKeys:
    """Of one client."""

    def __init__(self) -> None:
        self._in_flight: dict[tuple[int, ...], tuple[str, int]] = {}
        """Name, and how many requests have it."""

    @contextmanager
    def key_for(self, input_ids: Sequence[int]) -> Iterator[str]:
        """The name to send with a request that is in flight during the block."""
        prompt = tuple(input_ids)
        key, count = self._in_flight.get(prompt, (uuid.uuid4().hex, 0))
        self._in_flight[prompt] = key, count + 1
        try:
            yield key
        finally:
            _, count = self._in_flight.pop(prompt)
            if count > 1:
                self._in_flight[prompt] = key, count - 1
