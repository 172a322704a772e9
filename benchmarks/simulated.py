"""Engines in virtual time: an event loop whose clock jumps to the next timer, and servers that go by it."""

import asyncio
import heapq
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.SelectSelector):
    """Waits for nothing: instead of sleeping, the clock is set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits, and no timer is set")
        self.now += max(0.0, timeout)
        return []


class _AtOnce(ThreadPoolExecutor):
    """Work for a thread takes no time."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(call(*args, **kwargs))
        return done


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio in virtual time; nothing in it may wait for a file."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)
        self._clock_resolution = 1e-9
        self.set_default_executor(_AtOnce())

    def time(self) -> float:
        """Virtual seconds."""
        return self._jump.now


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class SimulatedEngine:
    """A server that decodes up to `slots` requests together, the others in the order of their arrival.

    All running ones decode at the same pace, which falls with their number: batch b gives b * speed / (1 + b / half)
    tokens a second.
    """

    def __init__(self, slots: int, speed: float, half: float):
        """
        Args:
            slots: requests decoded together.
            speed: tokens a second of a request alone.
            half: requests at which each has half of that.
        """
        self.slots, self.speed, self.half = slots, speed, half
        self.busy_s = 0.0
        """Seconds in which it had something to decode."""
        self._served = 0.0
        """Tokens that a request has got which has run since the beginning."""
        self._at = 0.0
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self._running) + len(self._queue)

    async def decode(self, tokens: int) -> None:
        """Return when so many tokens are decoded."""
        done = asyncio.get_running_loop().create_future()
        self._advance()
        self._count += 1
        heapq.heappush(self._queue, (self._count, tokens, done))
        self._go_on()
        await done

    def pause(self, is_paused: bool) -> None:
        """Stop decoding, for a push, or go on."""
        self._advance()
        self._is_paused = is_paused
        self._go_on()

    def _pace(self) -> float:
        batch = len(self._running)
        return 0.0 if self._is_paused or not batch else self.speed / (1 + batch / self.half)

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        self._served += self._pace() * (now - self._at)
        if self._running and not self._is_paused:
            self.busy_s += now - self._at
        self._at = now

    def _go_on(self) -> None:
        while self._queue and len(self._running) < self.slots:
            count, tokens, done = heapq.heappop(self._queue)
            heapq.heappush(self._running, (self._served + tokens, count, done))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if pace := self._pace():
            seconds = max(0.0, (self._running[0][0] - self._served) / pace)
            self._timer = asyncio.get_running_loop().call_later(seconds, self._finish)

    def _finish(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self._served + 1e-6:
            _, _, done = heapq.heappop(self._running)
            if not done.done():
                done.set_result(None)
        self._go_on()
