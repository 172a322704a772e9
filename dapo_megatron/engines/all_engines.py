"""Control calls to several engines at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from dapo_megatron.engines.control import EngineControl

T = TypeVar("T")


class AllEngines:
    """The engines that a push goes to; each call to one of them waits in a thread of its own."""

    def __init__(self, engines: Sequence[EngineControl] = ()):
        self.engines = list(engines)
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self.engines)))

    def start(self, call: Callable[[EngineControl], T]) -> list[tuple[EngineControl, Future[T]]]:
        """Make a call to every engine; returns each with its answer to come."""
        return [(engine, self._threads.submit(call, engine)) for engine in self.engines]

    def on_all(self, call: Callable[[EngineControl], T]) -> list[T]:
        """Results of a call to every engine, in their order."""
        return [answer.result() for _, answer in self.start(call)]

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for engine in self.engines:
            engine.close()
