"""What every process of a run does for whoever watches it: says what it does, and how it ended.

status/<process>.json is replaced whenever the phase changes and every second besides (`beat` counts), by a thread: a
process that is stopped, or whose interpreter is, beats no more. exits/<process>.json is written once, at the end.
"""

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from dapo_megatron.errors import DapoError, Kind, StorageError, told
from dapo_megatron.run_folder import RunFolder

BEAT_S = 1.0
FOLLOWS_ENGINES = "connects to the engines"
"""Detail of a trainer rank that waits for engines to answer and gives them its weights, whatever its phase."""
GREETS_CONTROLLER = "waits for the controller"
"""Detail of a trainer rank in its phase "start" until the controller has read its data."""
FAILED_BEATS = 10
"""Heartbeats in a row that could not be written before the process ends: the launcher would take it for hung."""


T = TypeVar("T")


class Status(msgspec.Struct):
    """What a process does now."""

    process: str
    host: str
    pid: int
    phase: str
    detail: str
    since: float
    """Unix time at which the phase began."""
    beat: int
    """Rises every second, as long as the process lives."""

    @property
    def place(self) -> str:
        """Who and where, for messages."""
        return f"{self.process} (pid {self.pid} on {self.host})"


class Exit(msgspec.Struct):
    """How a process ended by itself."""

    process: str
    host: str
    pid: int
    kind: Kind | None
    """None: it did its work."""
    message: str
    phase: str
    time: float


class Reporter:
    """Writes the status of one process, and its exit."""

    def __init__(self, folder: RunFolder, process: str, *, essential: bool = True):
        """
        Args:
            essential: the process ends when it can no longer say what it does, because others would take it for hung;
                False: nobody ends it for that, and its work goes on.
        """
        self.folder, self.process = folder, process
        self._essential = essential
        self._status = Status(process, socket.gethostname(), os.getpid(), "start", "", time.time(), 0)
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "Reporter":
        self.folder.statuses.mkdir(parents=True, exist_ok=True)
        self.folder.exits.mkdir(parents=True, exist_ok=True)
        self.folder.exit(self.process).unlink(missing_ok=True)
        self._show()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def phase(self, phase: str, detail: str = "") -> None:
        """Say what the process does now ("generate", "12/32 groups")."""
        with self._lock:
            since = self._status.since if phase == self._status.phase else time.time()
            self._status = msgspec.structs.replace(self._status, phase=phase, detail=detail, since=since)
        self._show()

    def detail(self, detail: str) -> None:
        """Say more of what the process does now, in the phase that goes on."""
        with self._lock:
            self._status = msgspec.structs.replace(self._status, detail=detail)
        self._show()

    def ended(self, kind: Kind | None, message: str) -> None:
        """Write the exit record; where the run folder is gone, nobody is left to read it."""
        s = self._status
        record = Exit(s.process, s.host, s.pid, kind, message, s.phase, time.time())
        with contextlib.suppress(OSError):
            self.folder.exits.mkdir(exist_ok=True)  # of a run that ends before any process has begun
            _replace(self.folder.exit(self.process), msgspec.json.encode(record))

    def _beat(self) -> None:
        failed = 0
        while not self._ended.wait(BEAT_S):
            with self._lock:
                self._status = msgspec.structs.replace(self._status, beat=self._status.beat + 1)
            try:
                self._write()
                failed = 0
            except OSError as e:
                failed += 1
                if failed == FAILED_BEATS and self._essential:
                    self._end_by(e)

    def _end_by(self, error: OSError) -> None:
        """The run folder cannot be written: say so now, rather than be taken for hung."""
        line = told(error) or StorageError(str(error))
        self.ended(line.kind, str(line))
        with contextlib.suppress(OSError):
            print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODES[line.kind])

    def _show(self) -> None:
        with contextlib.nullcontext() if self._essential else contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        with self._lock:
            _replace(self.folder.status(self.process), msgspec.json.encode(self._status))


EXIT_CODES: dict[Kind, int] = {"crash": 1, "configuration": 3, "data": 4, "engine": 5, "storage": 6, "preempted": 7}
"""The kind of an error, for a watcher that finds no exit record: the disk it should have been on may be full."""


def run_reported(reporter: Reporter, program: Callable[[], object]) -> int:
    """Run a process's work inside its reporter.

    SIGTERM, by which the launcher ends one that hangs, leaves every thread's stack on stderr, also where it hangs in C.

    Returns:
        0, or the kind's exit code; the reason is in the exit record and on stderr.
    """
    faulthandler.register(signal.SIGTERM, file=2, chain=True)
    try:
        with reporter:
            program()
    except (Exception, SystemExit) as e:  # whatever it is, the launcher must hear of it; the traceback goes to the log
        line = told(e)
        if line is None:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            line = DapoError(" ".join(traceback.format_exception_only(e)[-1].split())[:500])
        reporter.ended(line.kind, str(line))
        with contextlib.suppress(OSError):  # a log on a full disk
            print(f"error: {line}", file=sys.stderr, flush=True)
        return EXIT_CODES[line.kind]
    reporter.ended(None, "")
    return 0


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch and the like: nothing of that is garbage, and looking for some takes up to a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave(code: int) -> NoReturn:
    """End a process that has used torch, without taking its interpreter down first, which takes half a second.

    With torch.distributed it is not safe either: a thread of gloo that drops the last reference to a tensor meanwhile
    would abort the process ("terminate called without an active exception"), after all its work was done.
    """
    with contextlib.suppress(OSError):  # a log on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def read_statuses(folder: RunFolder) -> list[Status]:
    """Statuses of all processes that ever wrote one, by name; one that cannot be read is not there yet."""
    found = []
    for path in sorted(folder.statuses.glob("*.json")):
        # Another node replaces it at this moment, or crashed while it did: the next look, or heartbeat, mends it.
        with contextlib.suppress(OSError, StorageError):
            found.append(read_status(path))
    return found


def read_status(path: Path) -> Status:
    """What one process does.

    Raises:
        StorageError: the file is no status, or half of one.
        FileNotFoundError: there is none.
    """
    return _decoded(path, Status)


def read_exit(folder: RunFolder, process: str) -> Exit | None:
    """How a process ended; None where it left no word (it was killed, or runs).

    Raises:
        StorageError: what it left is no record, or half of one.
    """
    try:
        return _decoded(folder.exit(process), Exit)
    except FileNotFoundError:
        return None


def clear(folder: RunFolder) -> None:
    """Remove what an earlier start of the run left: it is not about the processes that are started now."""
    for old in (*folder.statuses.glob("*.json"), *folder.exits.glob("*.json")):
        old.unlink()


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as e:
        raise StorageError(f"{path} cannot be read ({e}): a crash cut it off; remove it") from None


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".new")
    aside.write_bytes(data)
    aside.replace(path)
