"""Which process of a run failed first, and the one line that says so."""

import signal
from collections.abc import Sequence

from dapo_megatron.errors import DapoError, EngineError, StorageError, error_of_kind
from dapo_megatron.process import EXIT_CODES, Exit, Status, read_exit
from dapo_megatron.run_folder import RunFolder
from launch.processes import Child


def failed(folder: RunFolder, children: Sequence[Child]) -> list[Child]:
    """Children that ended and should not have: an engine never leaves by itself, the others with 0 and a record."""
    return [c for c in children if c.process.poll() is not None and not _is_done(folder, c)]


def _is_done(folder: RunFolder, child: Child) -> bool:
    if child.process.returncode != 0 or child.name.startswith("engine"):
        return False
    records = [_word(folder, name) for name in child.processes]
    return all(record is not None and record.kind is None for record in records)


def failure(folder: RunFolder, children: Sequence[Child]) -> tuple[DapoError, str | None]:
    """The error of a run of whose children at least one has failed, and the host where it happened, if that is known.

    A killed process takes others with it, and of those that say why the controller comes first (the trainer passes on
    what it said), then whoever ended first.
    """
    ended = failed(folder, children)
    killed = [c for c in ended if c.process.returncode < 0]
    if killed:
        return _without_a_word(killed[0], folder), None
    records = [_word(folder, name) for child in ended for name in child.processes]
    told = [record for record in records if record is not None and record.kind is not None]
    if told:
        first = min(told, key=lambda record: (record.process != "controller", record.time))
        # Who left no word was killed, and whoever tells of it was not at fault.
        is_sure = first.kind != "crash" or all(records)
        return _by_record(first, folder), first.host if is_sure else None
    return _without_a_word(ended[0], folder), None


def _word(folder: RunFolder, process: str) -> Exit | None:
    """How a process ended; a record that cannot be read is none: another node writes it, or crashed while it did."""
    try:
        return read_exit(folder, process)
    except (OSError, StorageError):
        return None


def hang(status: Status, silence_s: float) -> DapoError:
    """The error of a run one of whose processes gives no sign of life."""
    return DapoError(
        f"{status.place} hangs: no sign of life for {silence_s:.0f} s, in phase {status.phase}"
        f"{f' ({status.detail})' if status.detail else ''}; see logs/latest/{status.process}.log"
    )


def unheard_of(process: str, started_s: float) -> DapoError:
    """The error of a run one of whose processes has given no sign of life since it was started."""
    step = process.partition("-")[0]  # whose srun may say why
    return DapoError(
        f"the {process} hangs: no sign of life since it was started {started_s:.0f} s ago; see logs/latest/{step}*.log"
    )


def _by_record(record: Exit, folder: RunFolder) -> DapoError:
    assert record.kind is not None
    log = folder.log(record.process)
    return error_of_kind(record.kind, f"the {record.process} stopped: {record.message} (log: {log})")


def _without_a_word(child: Child, folder: RunFolder) -> DapoError:
    code = child.process.returncode
    if code == EXIT_CODES["storage"]:
        return StorageError(
            f"the {child.name} stopped: the disk of {folder.path} is full, read-only or gone: make room, "
            "and go on from the newest checkpoint with --resume"
        )
    # An srun ends as a shell does: with 128 and the signal's number.
    number = -code if code < 0 else code - 128 if child.processes != (child.name,) else 0
    is_signal = number in [s.value for s in signal.Signals]
    how = (
        f"was killed by signal {number} ({signal.Signals(number).name})"
        if is_signal
        else f"ended with exit code {code}"
    )
    kind = EngineError if child.name.startswith("engine") else DapoError
    return kind(f"the {child.name} {how}; the end of {child.log}:\n{child.tail()}")
