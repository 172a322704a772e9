"""The starts of a run: a line of attempts.jsonl and a folder of logs each, and what the launcher does, in status/."""

import os
import time
from pathlib import Path

import msgspec

from dapo_megatron.errors import DataError
from dapo_megatron.observe.jsonl import read_lines
from dapo_megatron.run_folder import RunFolder
from launch.lock import read_holder
from launch.states import End, Requeue, State

REQUEUED = "requeued"
"""Phase of a launcher whose job goes back into the queue; the others are those of launch.states."""


class Attempt(msgspec.Struct, frozen=True):
    """One start of a run."""

    started: float
    """Unix time."""
    step: int
    """Of the checkpoint that it began with; 0: none."""
    slurm_job: int | None
    ends: float | None
    """Unix time of the job's time limit, if it has one."""


def open_logs(folder: RunFolder) -> Path:
    """The folder of this start's logs, made, and `latest` pointing at it; the caller holds the run's lock."""
    logs = folder.attempt_logs(len(read_attempts(folder)) + 1)
    logs.mkdir(parents=True, exist_ok=True)
    aside = logs.with_name(".latest")
    aside.unlink(missing_ok=True)
    aside.symlink_to(logs.name)
    os.replace(aside, folder.logs)
    return logs


def note_attempt(folder: RunFolder, step: int, ends: float | None) -> None:
    """Write down that the run is started, all at once; the caller holds its lock."""
    holder = read_holder(folder.lock)
    attempt = Attempt(time.time(), step, holder.slurm_job if holder else None, ends)
    aside = folder.attempts.with_suffix(".new")
    # What a crash left half-written is no line; behind it, this one would be none either.
    aside.write_bytes(b"".join(msgspec.json.encode(a) + b"\n" for a in (*read_attempts(folder), attempt)))
    os.replace(aside, folder.attempts)


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """All starts of a run, in order.

    Raises:
        DataError: a line is none.
    """
    try:
        return [msgspec.convert(row, Attempt) for row in read_lines(folder.attempts)]
    except msgspec.ValidationError as e:
        raise DataError(f"{folder.attempts} has a line that is no start of a run ({e}): remove it") from None


def told_restarts(state: State) -> str:
    """What was started again in this attempt, in words."""
    again = [f"{name} {_times(count)}" for name, count in state.engine_restarts.items() if count]
    if state.restarts:
        again.insert(0, f"training {_times(state.restarts)}")
    return f"started again: {', '.join(again)}" if again else ""


def final_phase(end: End | Requeue) -> tuple[str, str]:
    """(phase, detail) of a launcher that ends."""
    if isinstance(end, Requeue):
        return REQUEUED, end.why
    return "over", end.message.splitlines()[0] if end.message else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
