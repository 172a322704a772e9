"""What both directions of a conversion share: the output written aside, its journal, and the files beside the weights.

<out>.partial/
    journal.json   from what and how the output is made, and which parts are on the disk, with their hashes: an
                   interrupted conversion goes on
    output/        published by a rename when it is whole
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from dapo_megatron.checkpoint.store import sync_folder, write_synced
from dapo_megatron.errors import DapoError, StorageError
from dapo_megatron.weights.hf_config import read_json

LAYOUT = "layout.json"
"""In a converted checkpoint, {file: safetensors header} of its source."""
JOURNAL, OUTPUT = "journal.json", "output"
JOURNAL_EVERY = 2**30
"""Bytes between two entries of the journal: what an interrupt can cost."""
T = TypeVar("T")


class Piece(msgspec.Struct, frozen=True):
    """Where torch's writer put one tensor of a part: its key, its offsets in the stored tensor, and its bytes."""

    key: str
    offsets: tuple[int, ...] | None
    begin: int
    length: int


class Part(msgspec.Struct, frozen=True):
    """A file or a tensor that is on the disk; the hash is as in the manifest."""

    size: int
    xxh3: str
    pieces: list[Piece] = []


class Journal(msgspec.Struct):
    """How far a conversion is."""

    inputs: dict[str, tuple[int, int]]
    """Bytes and time of change (ns) of every file that it reads."""
    options: dict[str, str]
    done: dict[str, Part] = {}


class Aside:
    """The folder in which the output is made, as `path`, and the journal beside it."""

    def __init__(self, folder: Path, journal: Journal):
        self.folder, self.path, self.journal = folder, folder / OUTPUT, journal

    def record(self, parts: Mapping[str, Part]) -> None:
        """Write down parts that are on the disk."""
        self.journal.done |= parts
        write_synced(self.folder / (JOURNAL + ".new"), msgspec.json.encode(self.journal))
        os.replace(self.folder / (JOURNAL + ".new"), self.folder / JOURNAL)
        sync_folder(self.folder)

    def differs(self, what: str) -> DapoError:
        """The refusal to go on."""
        return DapoError(f"{self.folder} cannot be gone on with: {what}: remove it, and the conversion begins anew")


@contextmanager
def written_aside(out: Path, inputs: dict[str, tuple[int, int]], options: dict[str, str]) -> Iterator[Aside]:
    """A folder beside `out`, new or as an interrupted conversion left it; renamed to `out` at the end of the block.

    A block that is refused before any part was written down leaves nothing.

    Raises:
        StorageError: the disk is full.
        DapoError: `out` exists, another process is at it, or what lies beside it is something else, or was left of
            another source or of other options.
    """
    if os.path.lexists(out):
        raise DapoError(f"{out} exists: remove it, or choose another folder")
    folder = _beside(out)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise _in_the_way(folder, "is no folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DapoError(f"{folder} is being written by another process: wait, or choose another folder") from None
        aside = Aside(folder, Journal(inputs, options))
        _take_up(aside)
        try:
            yield aside
        except DapoError:
            if not aside.journal.done:
                shutil.rmtree(folder)
            raise
        for path in [aside.path, *aside.path.rglob("*/")]:
            sync_folder(path)
        os.rename(aside.path, out)
        sync_folder(out.parent)
        shutil.rmtree(folder)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"{folder} cannot be written ({e.strerror}): make room, and call it again to go on"
        ) from None
    finally:
        os.close(handle)


def _beside(out: Path) -> Path:
    return Path(f"{out}.partial")


def _in_the_way(folder: Path, why: str) -> DapoError:
    return DapoError(f"{folder}, where the output would be made, {why}: move it away, or choose another output")


def _take_up(aside: Aside) -> None:
    if not (aside.folder / JOURNAL).exists() and any(p.name != JOURNAL + ".new" for p in aside.folder.iterdir()):
        raise _in_the_way(aside.folder, "holds something else")
    if not aside.path.exists():  # nothing is made yet, or all was published, just before a kill
        aside.record({})
        aside.path.mkdir()
        return
    try:
        left = msgspec.json.decode((aside.folder / JOURNAL).read_bytes(), type=Journal)
    except msgspec.MsgspecError as e:
        raise aside.differs(f"its journal is damaged ({e})") from None
    now = aside.journal
    if left.options != now.options:
        raise aside.differs(f"it was made with {_options(left)}, now it is {_options(now)}")
    if changed := sorted(k for k in left.inputs.keys() | now.inputs.keys() if left.inputs.get(k) != now.inputs.get(k)):
        raise aside.differs(f"{changed[0]} of the source has changed since")
    aside.journal = left


def _options(journal: Journal) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(journal.options.items()))


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items; while one is used, a thread makes the next."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


def require_outside(out: Path, *sources: Path) -> None:
    """Raise a DapoError where the output would be, or would become a part of, what is read."""
    for source in sources:
        for place in (out, _beside(out)):
            if source.resolve() in (place.resolve(), *place.resolve().parents):
                what = "is" if place.resolve() == source.resolve() else "lies in"
                raise DapoError(f"{place} {what} {source}, which is read: choose an output elsewhere")


def require_room(path: Path, needed: int) -> None:
    """Raise a StorageError where the disk has not that many bytes."""
    if (free := shutil.disk_usage(path).free) < needed:
        raise StorageError(f"{path} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} are free: make room")


def set_config_dtype(config: Path, dtype: torch.dtype) -> None:
    """Where config.json names the type of the weights, name this one."""
    tree, name = read_json(config, ""), str(dtype).removeprefix("torch.")
    changed = {key: name for key in ("dtype", "torch_dtype") if tree.get(key) not in (None, name)}
    if changed:
        write_synced(config, (json.dumps(tree | changed, indent=2, ensure_ascii=False) + "\n").encode())


def stamps(folder: Path, names: list[str], prefix: str = "") -> dict[str, tuple[int, int]]:
    """{file: (bytes, time of change in ns)}."""
    found = {name: (folder / name).stat() for name in names}
    return {prefix + name: (s.st_size, s.st_mtime_ns) for name, s in found.items()}
