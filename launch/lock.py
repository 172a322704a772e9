"""One launcher for a run folder: a lock file that names its holder, and is recognised when the holder is gone."""

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from dapo_megatron.errors import ConfigError


class Holder(msgspec.Struct):
    """The launcher that holds a run folder."""

    host: str
    pid: int
    started: float
    """When that process began, by its host's clock: pids are used again."""
    slurm_job: int | None = None
    """The SLURM job that it is of: when that starts again, whoever held the lock before is gone."""


@contextmanager
def locked(path: Path, slurm_job: int | None = None) -> Iterator[None]:
    """Hold the lock at `path` as long as the block runs.

    Args:
        slurm_job: the job that this launcher is of; one with the same job has ended.

    Raises:
        ConfigError: another launcher holds it.
    """
    me = Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), slurm_job)
    while not _create(path, me):
        holder = read_holder(path)
        if holder is None:
            continue
        is_same_job = slurm_job is not None and holder.slurm_job == slurm_job
        if not is_same_job and (holder.host != me.host or _is_alive(holder)):
            raise ConfigError(
                f"{path.parent} is in use by another launcher (pid {holder.pid} on {holder.host}): wait for it, choose "
                f"another run_dir=..., or remove {path.name} if that launcher is gone"
            )
        _remove_stale(path, holder)
    try:
        yield
    finally:
        if read_holder(path) == me:  # the folder may be another run's by now, or gone
            path.unlink(missing_ok=True)


def _create(path: Path, holder: Holder) -> bool:
    """Atomic, and never empty: written aside, then linked into place."""
    aside = path.with_name(f".{path.name}.{holder.host}.{holder.pid}")
    aside.write_bytes(msgspec.json.encode(holder))
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


def read_holder(path: Path) -> Holder | None:
    """Whose lock it is; None: nobody's.

    Raises:
        ConfigError: the file is not a lock.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Holder)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        raise ConfigError(f"{path} is not a launcher's lock: remove it") from None


def _is_alive(holder: Holder) -> bool:
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def _remove_stale(path: Path, holder: Holder) -> None:
    """Of two launchers that find the same stale lock one removes it: a rename takes it away from the other."""
    aside = path.with_name(f".{path.name}.stale.{holder.host}.{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if read_holder(aside) != holder:  # somebody was faster, and this is a living lock
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
