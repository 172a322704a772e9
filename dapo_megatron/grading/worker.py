"""What runs inside a grading worker: load the grader, set the limits, grade."""

import contextlib
import functools
import importlib
import logging
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

from dapo_megatron.errors import DapoError

Grader = Callable[[str, str], bool]


def load_grader(reference: str) -> Grader:
    """The function `grade(text, truth) -> bool` that "package.module:function" names.

    Raises:
        DapoError: not of that form, not importable, or not a function.
    """
    module_name, colon, function_name = reference.partition(":")
    if not (module_name and colon and function_name):
        raise DapoError(f"grader {reference!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything at import; all of it is told in one line
        raise DapoError(
            f"grader {reference!r}: importing {module_name} failed ({type(error).__name__}: {error}); "
            "is it installed, or its folder in PYTHONPATH?"
        ) from None
    grader: Grader | None = getattr(module, function_name, None)
    if not callable(grader):
        names = sorted(name for name, value in vars(module).items() if callable(value) and name[0] != "_")
        raise DapoError(f"grader {reference!r}: {module_name} has no function {function_name}, only {names}")
    return grader


def start_worker(reference: str, memory_mb: int) -> None:
    """Initializer of a worker process: nothing it does may outlive its time limit or its parent."""
    # Pebble's SIGTERM handler is Python code, which a long computation in C does not get to.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_the_caller, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    with contextlib.suppress(DapoError):  # `check_grader` tells the user
        _limited_grader(reference, memory_mb)


def _die_with_the_caller() -> None:
    """A killed caller stops no worker; one whose answer holds the interpreter meets its CPU limit instead."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        wait([caller.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def check_grader(reference: str, memory_mb: int) -> None:
    """Raises the DapoError of `load_grader` in the caller, if there is one."""
    _limited_grader(reference, memory_mb)


def grade_in_worker(reference: str, memory_mb: int, cpu_s: float, text: str, truth: str) -> str:
    """ "right", "wrong", or in one line the exception that the grader raised."""
    try:
        grader = _limited_grader(reference, memory_mb)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s) + 1)
        return "right" if grader(text, truth) else "wrong"
    except BaseException as error:
        # Told as text: sent as an exception, sys.exit() or one that does not unpickle would harm the caller.
        return traceback.format_exception_only(error)[-1].strip()[:500]


@functools.cache
def _limited_grader(reference: str, memory_mb: int) -> Grader:
    """The grader, with the memory limit set above what its imports have taken."""
    grader = load_grader(reference)
    with open("/proc/self/statm") as statm:
        baseline = int(statm.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, baseline + memory_mb * 2**20)
    return grader


def _limit(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
