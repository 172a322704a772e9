"""What runs inside a grading worker: load the grader, set the limits, grade, check what the grader returns."""

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import multiprocessing
import numbers
import os
import reprlib
import resource
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing.connection import wait
from typing import Literal

from dapo_megatron.errors import ConfigError
from dapo_megatron.user_code import load_function

Grader = Callable[[str, str], object]
"""(text, truth) -> a verdict, or an awaitable of one: checked, because it is a user's."""
Outcome = tuple[Literal["right", "wrong", "raised", "refused"], str]
"""With the exception that was raised, or what is wrong with the grader's verdict, in one line."""


def start_worker(reference: str, memory_mib: int) -> None:
    """Initializer of a worker process: nothing it does may outlive its time limit or its parent."""
    # Pebble's SIGTERM handler is Python code, which a long computation in C does not get to.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.Thread(target=_die_with_the_caller, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    with contextlib.suppress(ConfigError):  # `check_grader` tells the user
        _limited_grader(reference, memory_mib)


def _die_with_the_caller() -> None:
    """A killed caller stops no worker; one whose answer holds the interpreter meets its CPU limit instead."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        wait([caller.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def check_grader(reference: str, memory_mib: int) -> None:
    """Raises the ConfigError of `load_function` in the caller, if there is one."""
    _limited_grader(reference, memory_mib)


def grade_for_cpu_time(reference: str, memory_mib: int, cpu_s: float, text: str, truths: tuple[str, ...]) -> Outcome:
    """As grade_in_worker, and SIGPROF ends the process at `cpu_s` seconds of CPU time, not at the next full ones."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return grade_in_worker(reference, memory_mib, cpu_s, text, truths)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def grade_in_worker(reference: str, memory_mib: int, cpu_s: float, text: str, truths: tuple[str, ...]) -> Outcome:
    """Verdict on one text: right if one of the truths makes it so, else raised if the grader raised on one of them."""
    raised = ""
    for truth in truths:
        try:
            grader = _limited_grader(reference, memory_mib)
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s) + 1)
            verdict = grader(text, truth)
            if inspect.isawaitable(verdict):
                verdict = asyncio.run(_finish(verdict))
        except BaseException as error:
            # Told as text: sent as an exception, sys.exit() or one that does not unpickle would harm the caller.
            raised = " ".join(traceback.format_exception_only(error)[-1].split())[:500]
            continue
        if not _is_verdict(verdict):
            shown = " ".join(reprlib.repr(verdict).split())
            kind = f"{type(verdict).__module__}.{type(verdict).__qualname__}".removeprefix("builtins.")
            return "refused", f"grading.grader={reference} returned {shown} ({kind}): return True or False"
        if verdict:
            return "right", ""
    return ("raised", raised) if raised else ("wrong", "")


async def _finish(awaitable: Awaitable[object]) -> object:
    return await awaitable


def _is_verdict(value: object) -> bool:
    """True, False, 1 or 0, of Python or numpy (which is not imported for that). A score of -1.0 or "no" is none."""
    numpy_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    return numpy_bool or (isinstance(value, numbers.Integral) and value in (0, 1))


@functools.cache
def _limited_grader(reference: str, memory_mib: int) -> Grader:
    """The grader, with the memory limit set above what its imports have taken."""
    grader = load_function(reference, "grading.grader", "text", "truth")
    with open("/proc/self/statm") as statm:
        baseline = int(statm.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, baseline + memory_mib * 2**20)
    return grader


def _limit(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
