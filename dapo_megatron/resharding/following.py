"""Which engines a trainer pushes to: those that are up. The launcher says who there is, and replaces who is lost.

at first                                       all are waited for
one that loads, after another start of it      is left out until it is up: until it is pushed to, nobody asks it
one that was pushed to, and does not answer    is waited for until it is replaced: it may serve an old version
"""

import time
from collections.abc import Callable

from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.errors import EngineError

LOOK_S = 0.25


class FollowedEngines:
    """Follows the engine set for rank 0; the other ranks are told who is connected."""

    def __init__(self, read_set: Callable[[], EngineSet], is_up: Callable[[Member], bool], start_timeout_s: float):
        """
        Args:
            read_set: the launcher's word.
            is_up: whether an engine answers now.
            start_timeout_s: for an answer of those that are waited for.
        """
        self._read_set, self._is_up, self._start_timeout_s = read_set, is_up, start_timeout_s
        self._joined: set[Member] = set()
        """Who ever was connected."""
        self.connected = EngineSet(0, ())

    def connect(self, engines: EngineSet) -> None:
        """These are connected from now on."""
        self.connected = engines
        self._joined |= set(engines.members)

    def is_outdated(self) -> bool:
        """Whether the launcher has replaced an engine since `find` looked last."""
        return self._read_set().generation != self.connected.generation

    def can_follow(self) -> bool:
        """Whether an engine is up that is not connected."""
        return any(self._is_up(m) for m in self._read_set().members if m not in self.connected.members)

    def has_lost(self) -> bool:
        """Whether an engine that is connected has been replaced."""
        return not set(self.connected.members) <= set(self._read_set().members)

    def find(self) -> EngineSet:
        """The engines to connect to.

        Raises:
            EngineError: one that is waited for did not answer in time, or was replaced before.
        """
        found, start_s = self._read_set(), self._start_timeout_s
        self.connected, end = EngineSet(found.generation, ()), time.monotonic() + start_s
        while not self.is_outdated():
            up = [m for m in found.members if self._is_up(m)]
            awaited = [m for m in found.members if m not in up and (not self._joined or m in self._joined)]
            if up and not awaited:
                return EngineSet(found.generation, tuple(up))
            if time.monotonic() > end:
                late = (awaited or found.members)[0]
                raise EngineError(f"{late.name} ({late.url}) did not answer within {start_s:.0f} s: see its log")
            time.sleep(LOOK_S)
        raise EngineError("an engine was replaced before it answered")
