"""Grading in worker processes that may be killed: a bad answer costs one worker for one time limit.

    grade(text, truth) -> quick comparison, inline  -> verdict          (default grader, nearly all answers)
                       -> worker: CPU time, memory  -> verdict
                          `- over a limit, crashed, raised -> "unknown", the worker is replaced

The caller logs "unknown" with the prompt it belongs to; `GradingPool.unknown` counts them by reason.
"""

import asyncio
import logging
import math
import multiprocessing
from collections import Counter

from pebble import ProcessExpired, ProcessPool

from dapo_megatron.algorithm.reward import Verdict
from dapo_megatron.errors import DapoError
from dapo_megatron.grading import answers
from dapo_megatron.grading.worker import check_grader, grade_in_worker, start_worker

logger = logging.getLogger(__name__)

DEFAULT_GRADER = "dapo_megatron.grading.answers:grade"
EQUIVALENCE = "dapo_megatron.grading.equivalence:equivalent"
"""What its workers run: extraction and integers are done by the caller."""
START_TIMEOUT_S = 120.0
"""Seconds for workers to start and import the grader."""
TASKS_PER_WORKER = 2000
"""A worker is replaced after so many answers: sympy's caches grow against the memory limit."""


class GradingPool:
    """Asynchronous context manager: `async with GradingPool(...) as pool: await pool.grade(text, truth)`.

    Workers fork from multiprocessing's fork server, never from the caller with its threads and sockets. Each
    worker imports the caller's main module: start the caller as `python -m package` (whose `__main__` is not
    imported), or keep that module light.
    """

    def __init__(self, grader: str, workers: int, timeout_s: float, memory_mb: int) -> None:
        """
        Args:
            grader: "package.module:function" (see `load_grader`).
            workers: processes.
            timeout_s: seconds one answer may take, as wall-clock time and as CPU time.
            memory_mb: MiB that grading may allocate beyond what the worker needs after its imports.
        """
        self._quick = grader == DEFAULT_GRADER
        self._reference = EQUIVALENCE if self._quick else grader
        self._workers = workers
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._in_flight = 0
        self._context = multiprocessing.get_context("forkserver")
        self._pool = self._new_pool()
        self._stopping: list[asyncio.Future[None]] = []
        self.unknown: Counter[str] = Counter()
        """Answers without a verdict by reason: "timeout", "crashed" or "raised"."""

    @property
    def trouble(self) -> str | None:
        """Why answers have no verdict, in one line; None if all have one."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.unknown.items())
        return f"the grader: {counts}" if counts else None

    async def __aenter__(self) -> "GradingPool":
        """Starts the workers.

        Raises:
            DapoError: the grader cannot be loaded, or no worker is ready within `START_TIMEOUT_S`.
        """
        try:
            await self._start()
        except BaseException:  # also when cancelled: there is no __aexit__ after a failed __aenter__
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def grade(self, text: str, truth: str) -> Verdict:
        """Verdict on one response. Does not raise on account of the answer or the grader; see `unknown`."""
        # Lone surrogates (a token cut through a character) cannot be encoded by what comes later.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if self._quick:
            answer = answers.extract_answer(text)
            quick = False if answer is None else answers.compare_quickly(answer, truth)
            if answer is None or quick is not None:
                return "right" if quick else "wrong"
            text, truth = answer, answers.strip_markup(truth)
        return await self._ask_worker(text, truth)

    async def _start(self) -> None:
        # Replacing a killed worker then costs a fork, not the import of sympy.
        self._context.set_forkserver_preload([EQUIVALENCE.partition(":")[0]] if self._quick else [])
        ready = self._pool.schedule(check_grader, (self._reference, self._memory_mb))
        name = f"grader {self._reference!r}"
        try:
            await asyncio.wait_for(asyncio.wrap_future(ready), START_TIMEOUT_S)
        except TimeoutError:
            raise DapoError(f"{name}: no worker was ready after {START_TIMEOUT_S:.0f} s") from None
        except RuntimeError:  # the pool breaks when its workers die before they take work
            raise DapoError(f"{name}: its process dies while it imports the grader") from None

    async def _ask_worker(self, text: str, truth: str) -> Verdict:
        self._in_flight += 1
        try:
            for _ in range(2):  # the second time in a new pool, if the first one broke under another answer
                pool = self._pool
                try:
                    return await self._ask(pool, text, truth)
                except RuntimeError:  # BrokenProcessPool is one
                    self._replace(pool)
            return self._unknown("crashed")
        finally:
            self._in_flight -= 1

    async def _ask(self, pool: ProcessPool, text: str, truth: str) -> Verdict:
        limits = (self._reference, self._memory_mb, self._timeout_s)
        future = pool.schedule(grade_in_worker, (*limits, text, truth), timeout=self._timeout_s)
        # The pool's own time limit starts with the work; this one also bounds the wait in the queue.
        rounds = math.ceil(self._in_flight / self._workers) + 1
        try:
            waiter = asyncio.wrap_future(future)
            done, _ = await asyncio.wait([waiter], timeout=START_TIMEOUT_S + rounds * self._timeout_s)
            if not done:
                self._replace(pool)
                return self._unknown("timeout")
            outcome: str = waiter.result()
        except TimeoutError:
            return self._unknown("timeout")
        except ProcessExpired:
            return self._unknown("crashed")
        finally:
            future.cancel()  # of the waiting task: kills the worker; of a finished future: nothing
        if outcome == "right":
            return "right"
        if outcome == "wrong":
            return "wrong"
        logger.warning("the grader raised %s", outcome)
        return self._unknown("raised")

    def _unknown(self, reason: str) -> Verdict:
        self.unknown[reason] += 1
        return "unknown"

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers,
            max_tasks=TASKS_PER_WORKER,
            initializer=start_worker,
            initargs=(self._reference, self._memory_mb),
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
