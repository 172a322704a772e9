"""Errors that a user is meant to read: one line that says what, where and what to do, and of which kind it is.

The kind decides what a launcher does next: configuration and data are mended by a person, an engine can be started
again, a full or lost disk needs room, a preempted or crashed process goes on from the last checkpoint.
"""

import errno
import sys
from collections.abc import Callable
from typing import ClassVar, Literal

Kind = Literal["configuration", "data", "engine", "storage", "preempted", "crash"]


class DapoError(Exception):
    """A failure told in one line; entry points print it without a traceback."""

    kind: ClassVar[Kind] = "crash"


class ConfigError(DapoError):
    """An option, a model folder or a user's function that cannot work."""

    kind = "configuration"


class DataError(DapoError):
    """A file of prompts that cannot be used, or prompts that nothing can be learned from."""

    kind = "data"


class EngineError(DapoError):
    """An engine that is gone, does not answer or refuses."""

    kind = "engine"


class StorageError(DapoError):
    """A disk that is full, read-only or gone."""

    kind = "storage"


class Preempted(DapoError):
    """The process was asked to stop."""

    kind = "preempted"


_OF_KIND: dict[str, type[DapoError]] = {
    c.kind: c for c in (ConfigError, DataError, EngineError, StorageError, Preempted, DapoError)
}
_STORAGE = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.ESTALE}


def error_of_kind(kind: str, message: str) -> DapoError:
    """The error that another process told of."""
    return _OF_KIND[kind](message)


def told(error: BaseException) -> DapoError | None:
    """The one line for an error: a DapoError itself, or one about a failed disk; None where a traceback is wanted."""
    if isinstance(error, DapoError):
        return error
    if isinstance(error, OSError) and (error.errno in _STORAGE or error.filename is not None):
        where = f" at {str(error.filename)[:200]}" if error.filename is not None else ""
        return StorageError(f"{error.strerror}{where}: make room, or check that the folder is there and writable")
    return None


def exit_code(program: Callable[[], object]) -> int:
    """Run a program: 0, or 1 after an error that can be told in one line, which goes to stderr as `error: ...`.

    One that ends itself by sys.exit, as typer's do, gives its own code.
    """
    try:
        program()
    except (DapoError, OSError) as e:
        line = told(e)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 1
    except SystemExit as e:
        if e.code is not None and not isinstance(e.code, int):
            raise
        return e.code or 0
    return 0
