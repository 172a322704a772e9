"""One attempt of a run: the folder is held, the job prepared, and in the end a word and a report are left."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import DapoError, Preempted, error_of_kind, told
from dapo_megatron.observe.report import write_report
from dapo_megatron.process import Reporter
from dapo_megatron.run_folder import RunFolder
from launch.job import Job, Resume, not_a_folder, prepare_new, prepare_resume
from launch.lock import locked
from launch.processes import interruptible
from launch.states import End, GraceOver, StopAsked

Asked = Callable[[], StopAsked | GraceOver | None]


@contextmanager
def attempt(
    config: RunConfig,
    folder: RunFolder,
    resume: Resume | None,
    weights: Path | None,
    slurm_job: int | None = None,
    check: Callable[[RunConfig], None] = lambda _: None,
) -> Iterator[Job]:
    """The job to start inside the block, whose error, or good end, is written down.

    Args:
        check: raises DapoError, also written down, where the run cannot start; nothing of it is in the folder then, so
            that data or model can still be changed.

    Raises:
        DapoError: the run folder is taken, or its checkpoint is damaged; as `check`.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    make_folder(folder)
    with interruptible(), locked(folder.lock, slurm_job):
        with _error_written(folder):
            check(config)
        job = prepare_new(config, folder, weights) if resume is None else prepare_resume(config, folder, resume)
        with _error_written(folder):
            yield job
        Reporter(folder, "launcher").ended(None, "")


@contextmanager
def asked_by_signals(numbers: dict[signal.Signals, StopAsked]) -> Iterator[Asked]:
    """What signals ask for: each for its stop, and SIGTERM or Ctrl-C for the second time for an end at once.

    One that is blocked is heard inside the block, also if it came before.
    """
    waiting: list[StopAsked | GraceOver] = []
    urgent = 0

    def hear(number: int, _: object) -> None:
        nonlocal urgent
        waiting.append(numbers[signal.Signals(number)])
        urgent += number in (signal.SIGTERM, signal.SIGINT)
        if urgent > 1:
            waiting.append(GraceOver())

    before = {number: signal.signal(number, hear) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield lambda: waiting.pop(0) if waiting else None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_end(end: End) -> None:
    """Nothing for a run that is finished.

    Raises:
        DapoError: why it ended.
    """
    if end.kind is not None:
        raise error_of_kind(end.kind, end.message)


@contextmanager
def _error_written(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except (DapoError, OSError, KeyboardInterrupt) as e:
        _leave_word(folder, e)
        raise


def _leave_word(folder: RunFolder, error: DapoError | OSError | KeyboardInterrupt) -> None:
    """An exit record and a report, where the disk lets us: what ended the run is what must be told."""
    told_by = Preempted("stopped by a signal") if isinstance(error, KeyboardInterrupt) else told(error)
    kind, message = (told_by.kind, str(told_by)) if told_by is not None else ("crash", str(error))
    Reporter(folder, "launcher").ended(kind, message)
    with contextlib.suppress(OSError, DapoError):
        write_report(folder)


def make_folder(folder: RunFolder) -> None:
    """Raise ConfigError where the run's folder cannot be made."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise not_a_folder(folder) from None
