"""What the files of a run say now: read on any machine that sees the run folder, without asking a process.

Ages need a clock, and hosts' clocks differ. Every living process, the launcher too, replaces its status each second, so
the newest of these files was written now, by the file server's clock: a heartbeat's age is counted from it. Where a
launcher holds the folder and nobody seems to live, a second look tells a dead run from a clock that is off, and then
the reader's own clock counts. Since when a phase lasts is what the process's host says.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.checkpoint.integrity import check_files
from dapo_megatron.checkpoint.manifest import MANIFEST, read_manifest
from dapo_megatron.checkpoint.published import published, step_of
from dapo_megatron.config import load_config
from dapo_megatron.engines.engine_set import EngineSet, read_engine_set
from dapo_megatron.errors import ConfigError, StorageError
from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.metrics import Record, read_metrics
from dapo_megatron.observe.pace import Pace, is_complete, pace
from dapo_megatron.process import BEAT_S, Exit, Status, read_exit, read_status
from dapo_megatron.run_folder import RunFolder
from launch.attempts import Attempt, read_attempts
from launch.lock import Holder, read_holder

FRESH_S = 3 * BEAT_S
"""So young is the newest heartbeat of a living run, where the reader's clock is the file server's."""
TAIL_LINES = 5
TAIL_BYTES = 8192


@dataclass(frozen=True)
class Process:
    """A process that has said what it does; ages in seconds."""

    name: str
    host: str
    pid: int
    phase: str
    detail: str
    phase_s: float
    silence_s: float
    """Since its last heartbeat; means nothing once it has ended."""
    exit: Exit | None

    @property
    def place(self) -> str:
        """Who and where."""
        return f"{self.name} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint all of whose files are there; hashes are not looked at."""

    step: int
    age_s: float


@dataclass(frozen=True)
class Push:
    """The last one that ended."""

    version: int
    seconds: float
    bytes: float
    age_s: float
    """Of the step's record, which follows it."""


@dataclass(frozen=True)
class Snapshot:
    """One look at a run."""

    name: str
    step: int
    total_steps: int
    is_complete: bool
    """Whether nothing is left to do."""
    ranks: int
    """Trainer ranks that there must be."""
    timeout_s: float
    """Silence after which a process is taken for hung."""
    pace: Pace | None
    saved: Saved | None
    push: Push | None
    attempt: int
    """Number of the start, from 1; 0: none yet."""
    started: Attempt | None
    """The last start."""
    holder: Holder | None
    """The launcher that holds the folder; None: nothing runs."""
    held_s: float
    """Seconds for which it has held it."""
    ended: Exit | None
    """How the last launcher ended, if it said so."""
    launcher: Process | None
    processes: tuple[Process, ...]
    """All others."""
    engines: EngineSet | None
    engines_s: float
    """Since the engine set was written."""
    log: tuple[str, ...]
    """The launcher's last lines."""


def look(folder: RunFolder) -> Snapshot:
    """What the run's files say now.

    Raises:
        ConfigError: the folder holds no run.
        DapoError: a file that is there cannot be read.
    """
    if not folder.config.exists():
        raise ConfigError(f"{folder.path} holds no run: there is no {folder.config.name}")
    config = load_config(folder.last_config)
    holder = read_holder(folder.lock)
    now, statuses = _now(folder) if holder is not None else (time.time(), _statuses(folder))
    processes = [_process(folder, status, age, now) for status, age in statuses]
    records, attempts = read_metrics(folder), read_attempts(folder)
    return Snapshot(
        name=folder.name,
        step=int(records[-1][m.STEP]) if records else 0,
        total_steps=config.trainer.steps,
        is_complete=is_complete(config, records),
        ranks=config.world_size,
        timeout_s=config.deadlines.heartbeat,
        pace=pace(records, config.trainer.steps),
        saved=_saved(folder, now),
        push=_push(records, now),
        attempt=len(attempts),
        started=attempts[-1] if attempts else None,
        holder=holder,
        held_s=_age(folder.lock, now),
        ended=read_exit(folder, "launcher"),
        launcher=next((p for p in processes if p.name == "launcher"), None),
        processes=tuple(p for p in processes if p.name != "launcher"),
        engines=read_engine_set(folder) if folder.engine_set.exists() else None,
        engines_s=_age(folder.engine_set, now),
        log=_tail(folder.journal),
    )


def file_server_time(first: Sequence[float], reader: float, second: Sequence[float] | None = None) -> float | None:
    """The time by the clock that dated the heartbeats. Pure.

    Args:
        first: when each status was written, at a first look.
        reader: the reader's own time then.
        second: the same a little later; None before the second look.

    Returns:
        None where a second look is needed.
    """
    newest = max(first, default=reader)
    if not first or 0 <= reader - newest <= FRESH_S:
        return reader
    if second is None:
        return None
    return max(second) if max(second, default=newest) > newest else max(reader, newest)


def _now(folder: RunFolder) -> tuple[float, list[tuple[Status, float]]]:
    """The time, and each status with the time at which it was written."""
    seen = _statuses(folder)
    now = file_server_time([t for _, t in seen], time.time())
    if now is None:
        time.sleep(FRESH_S)
        first, seen = [t for _, t in seen], _statuses(folder)
        now = file_server_time(first, time.time(), [t for _, t in seen])
        assert now is not None
    return now, seen


def _statuses(folder: RunFolder) -> list[tuple[Status, float]]:
    found = []
    for path in sorted(folder.statuses.glob("*.json")):
        try:
            found.append((read_status(path), path.stat().st_mtime))
        except FileNotFoundError:  # the launcher clears them before it starts the training again
            continue
    return found


def _process(folder: RunFolder, status: Status, written: float, now: float) -> Process:
    return Process(
        name=status.process,
        host=status.host,
        pid=status.pid,
        phase=status.phase,
        detail=status.detail,
        phase_s=max(now - status.since, 0),
        silence_s=max(now - written, 0),
        exit=read_exit(folder, status.process),
    )


def _age(path: Path, now: float) -> float:
    """Seconds since a file was written; 0: it is not there."""
    try:
        return max(now - path.stat().st_mtime, 0)
    except FileNotFoundError:
        return 0


def _saved(folder: RunFolder, now: float) -> Saved | None:
    for path in reversed(published(folder)):
        try:
            check_files(path, read_manifest(path))
            return Saved(step_of(path), max(now - (path / MANIFEST).stat().st_mtime, 0))
        except (StorageError, FileNotFoundError):  # damaged, or removed meanwhile
            continue
    return None


def _push(records: Sequence[Record], now: float) -> Push | None:
    for record in reversed(records):
        if m.SYNC_SECONDS in record:
            age = max(now - record[m.TIME], 0)
            return Push(int(record[m.VERSION]), record[m.SYNC_SECONDS], record[m.SYNC_BYTES], age)
    return None


def _tail(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ()
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        return tuple(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
