"""Grading in worker processes that may be killed: a bad answer costs one worker for one time limit.

    grade(text, *truths) -> quick comparison, inline  -> verdict          (built-in grader, nearly all answers)
                         -> worker: CPU time, memory  -> verdict
                            |- over a limit, crashed, raised -> "unknown", the worker is replaced
                            `- a grader that returns no verdict -> ConfigError, which ends the run

The caller logs "unknown" with the prompt it belongs to; `GradingPool.unknown` counts them by reason, and
`GradingPool.trouble` says it in a line.
"""

import asyncio
import logging
import math
import multiprocessing
import signal
from collections import Counter

from pebble import ProcessExpired, ProcessPool

from dapo_megatron.algorithm.reward import Verdict
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.grading.answers import compare_quickly
from dapo_megatron.grading.extraction import extract_answer, without_thought
from dapo_megatron.grading.worker import check_grader, grade_for_cpu_time, grade_in_worker, start_worker

logger = logging.getLogger(__name__)

DEFAULT_GRADER = "dapo_megatron.grading.answers:grade"
"""The built-in grader, which `None` stands for too."""
EQUIVALENCE = "dapo_megatron.grading.equivalence:equivalent"
"""What its workers run: extraction and integers are done by the caller."""
START_TIMEOUT_S = 120.0
"""Seconds for workers to start and import the grader."""
WAITING = 20.0
"""Wall-clock seconds for one of CPU time, where that alone is to decide."""
TASKS_PER_WORKER = 2000
"""A worker is replaced after so many answers: sympy's caches grow against the memory limit."""


class GradingPool:
    """Asynchronous context manager: `async with GradingPool(...) as pool: await pool.grade(text, *truths)`.

    Workers fork from multiprocessing's fork server, never from the caller with its threads and sockets. Each
    worker imports the caller's main module: start the caller as `python -m package` (whose `__main__` is not
    imported), or keep that module light.
    """

    def __init__(
        self,
        grader: str | None,
        workers: int,
        timeout_s: float,
        memory_mib: int,
        *,
        thinking: tuple[str, str] | None = None,
        boxed_only: bool = False,
        by_cpu_time: bool = False,
    ) -> None:
        """
        Args:
            grader: "package.module:function" (see `user_code.load_function`); None is the built-in one.
            workers: processes.
            timeout_s: seconds one answer may take, as wall-clock time and as CPU time.
            memory_mib: MiB that grading may allocate beyond what the worker needs after its imports.
            thinking: opening and closing tag of thoughts: only what follows the last closing one is graded, and a
                response without it is wrong. For any grader.
            boxed_only: to the built-in grader, only a box is an answer.
            by_cpu_time: timeout_s is CPU time alone, so that no verdict depends on what else the machine does; a
                grader that waits is stopped after WAITING times as long.
        """
        self._quick = grader is None or grader == DEFAULT_GRADER
        self._reference = EQUIVALENCE if grader is None or self._quick else grader
        self._thinking = thinking
        self._boxed_only = boxed_only
        self._workers = workers
        self._timeout_s = timeout_s
        self._by_cpu_time = by_cpu_time
        self._wall_s = timeout_s * WAITING if by_cpu_time else timeout_s
        self._memory_mib = memory_mib
        self._in_flight = 0
        self._context = multiprocessing.get_context("forkserver")
        self._pool = self._new_pool()
        self._stopping: list[asyncio.Future[None]] = []
        self.unknown: Counter[str] = Counter()
        """Answers without a verdict by reason: "timeout", "crashed" or "raised"."""
        self._last_trouble = ""

    async def __aenter__(self) -> "GradingPool":
        """Starts the workers.

        Raises:
            ConfigError: the grader cannot be loaded, or no worker is ready within `START_TIMEOUT_S`.
        """
        try:
            await self._start()
        except BaseException:  # also when cancelled: there is no __aexit__ after a failed __aenter__
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    @property
    def trouble(self) -> str | None:
        """Why answers got no verdict, in one line; None if all got one."""
        if not self.unknown:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.unknown.most_common())
        return f"{self.unknown.total()} answers without verdict: {reasons}, the last: {self._last_trouble}"

    async def grade(self, text: str, truth: str, *others: str) -> Verdict:
        """Verdict on one response: right if one of the truths makes it so.

        Does not raise on account of the answer, or of a grader that hangs, crashes or raises: see `unknown`.

        Raises:
            ConfigError: the grader returns something that is no verdict.
        """
        # Lone surrogates (a token cut through a character) cannot be encoded by what comes later.
        said: str | None = text.encode("utf-8", "replace").decode("utf-8")
        if said is not None and self._thinking:
            said = without_thought(said, self._thinking)
        if said is not None and self._quick:
            said = extract_answer(said, self._boxed_only)
        if said is None:
            return "wrong"
        truths = (truth, *others)
        if self._quick:
            quick = {each: compare_quickly(said, each) for each in truths}
            if True in quick.values():
                return "right"
            truths = tuple(each for each, verdict in quick.items() if verdict is None)
        return await self._ask_worker(said, truths) if truths else "wrong"

    async def _start(self) -> None:
        # Replacing a killed worker then costs a fork, not the import of sympy.
        self._context.set_forkserver_preload([EQUIVALENCE.partition(":")[0]] if self._quick else [])
        ready = self._pool.schedule(check_grader, (self._reference, self._memory_mib))
        name = f"grading.grader={self._reference}"
        try:
            await asyncio.wait_for(asyncio.wrap_future(ready), START_TIMEOUT_S)
        except TimeoutError:
            raise ConfigError(f"{name}: no worker was ready after {START_TIMEOUT_S:.0f} s") from None
        except RuntimeError:  # the pool breaks when its workers die before they take work
            raise ConfigError(f"{name}: its process dies while it imports the grader") from None

    async def _ask_worker(self, text: str, truths: tuple[str, ...]) -> Verdict:
        self._in_flight += 1
        try:
            for _ in range(2):  # the second time in a new pool, if the first one broke under another answer
                pool = self._pool
                try:
                    return await self._ask(pool, text, truths)
                except RuntimeError:  # BrokenProcessPool is one
                    self._replace(pool)
            return self._unknown("crashed", "the grader's process died")
        finally:
            self._in_flight -= 1

    async def _ask(self, pool: ProcessPool, text: str, truths: tuple[str, ...]) -> Verdict:
        limits = (self._reference, self._memory_mib, self._timeout_s)
        grade = grade_for_cpu_time if self._by_cpu_time else grade_in_worker
        future = pool.schedule(grade, (*limits, text, truths), timeout=self._wall_s)
        # The pool's own time limit starts with the work; this one also bounds the wait in the queue.
        rounds = math.ceil(self._in_flight / self._workers) + 1
        try:
            waiter = asyncio.wrap_future(future)
            done, _ = await asyncio.wait([waiter], timeout=START_TIMEOUT_S + rounds * self._wall_s)
            if not done:
                self._replace(pool)
                return self._unknown("timeout", f"no verdict within {self._timeout_s:g} s")
            outcome, told = waiter.result()
        except TimeoutError:
            return self._unknown("timeout", f"no verdict within {self._timeout_s:g} s")
        except ProcessExpired as e:
            if e.exitcode == -signal.SIGPROF:
                return self._unknown("timeout", f"no verdict within {self._timeout_s:g} s of CPU time")
            return self._unknown("crashed", "the grader's process died")
        finally:
            future.cancel()  # of the waiting task: kills the worker; of a finished future: nothing
        if outcome == "refused":
            raise ConfigError(told)
        if outcome == "raised":
            logger.warning("the grader raised %s", told)
            return self._unknown("raised", told)
        return "right" if outcome == "right" else "wrong"

    def _unknown(self, reason: str, told: str) -> Verdict:
        self.unknown[reason] += 1
        self._last_trouble = told
        return "unknown"

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers,
            max_tasks=TASKS_PER_WORKER,
            initializer=start_worker,
            initargs=(self._reference, self._memory_mib),
            context=self._context,
        )

    def _replace(self, pool: ProcessPool) -> None:
        """Goes on with a new pool, unless another answer has seen to it."""
        if pool is self._pool:
            self._pool = self._new_pool()
            self._stop(pool)

    def _stop(self, pool: ProcessPool) -> None:
        """Kills the workers; in a thread, because a worker that ignores SIGTERM is given some seconds."""
        pool.stop()
        self._stopping.append(asyncio.get_running_loop().run_in_executor(None, pool.join))

    async def _close(self) -> None:
        self._stop(self._pool)
        await asyncio.gather(*self._stopping)


def grading_pool(config: RunConfig) -> GradingPool:
    """The pool that a run's config asks for."""
    g = config.grading
    thinking = (g.thinking[0], g.thinking[1]) if g.thinking else None
    boxed_only = config.data.template == "boxed"
    return GradingPool(
        g.grader,
        g.workers,
        g.timeout_s,
        g.memory_mib,
        thinking=thinking,
        boxed_only=boxed_only,
        by_cpu_time=config.engine.deterministic,
    )
