"""Are the files of a checkpoint those that were written? Sizes, names and hashes against the manifest."""

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from dapo_megatron.checkpoint.manifest import HF, MANIFEST, MODEL, FileRecord, Manifest, read_manifest
from dapo_megatron.errors import StorageError

BLOCK = 8 << 20
"""Bytes read at a time."""
READERS = 4
"""Files read at a time by one process; hashing and reading hold no interpreter lock."""


def record_of(path: Path) -> FileRecord:
    """Size and hash of a file, read from the disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(BLOCK))
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def records_of(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and hash of some files of a folder, by their paths in it."""
    return {name: record_of(folder / name) for name in names}


def files_in(folder: Path) -> set[str]:
    """Paths of all files of a checkpoint, in it, but for the manifest."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} - {MANIFEST}


def check_files(path: Path, manifest: Manifest) -> None:
    """Compare names and sizes; nothing is read.

    Raises:
        StorageError: a file is missing, too many, or of another size.
    """
    places = {str(parent) for name in manifest.files for parent in Path(name).parents} | {HF, MODEL}
    for entry in path.rglob("*"):
        name = str(entry.relative_to(path))
        if entry.is_symlink() or (entry.is_dir() and name not in places):
            raise StorageError(f"{entry} does not belong to the checkpoint: its manifest does not list it")
    found = files_in(path)
    if missing := sorted(manifest.files.keys() - found):
        raise StorageError(f"{path / missing[0]} is missing")
    if extra := sorted(found - manifest.files.keys()):
        raise StorageError(f"{path / extra[0]} does not belong to the checkpoint: its manifest does not list it")
    for name, record in manifest.files.items():
        if (size := (path / name).stat().st_size) != record.size:
            raise StorageError(f"{path / name} has {size} bytes, {record.size} were written")


def check_hashes(
    path: Path, manifest: Manifest, share: int = 0, shares: int = 1, *, names: Collection[str] | None = None
) -> None:
    """Compare the hashes of one of `shares` equal shares of the files, or of those with the given names.

    Raises:
        StorageError: a file has other content than was written, or cannot be read.
    """
    by_size = sorted(manifest.files if names is None else names, key=lambda name: (-manifest.files[name].size, name))
    with ThreadPoolExecutor(READERS) as readers:
        for name, found in readers.map(lambda name: (name, _read(path / name)), by_size[share::shares]):
            if found != manifest.files[name]:
                raise StorageError(f"{path / name} is damaged: its content does not have the hash that was written")


def check_small(path: Path, manifest: Manifest) -> list[str]:
    """Compare all names and sizes, and the hashes of small files (BLOCK bytes at most); returns the others' names.

    Raises:
        StorageError: says what is damaged.
    """
    check_files(path, manifest)
    large = [name for name, record in manifest.files.items() if record.size > BLOCK]
    check_hashes(path, manifest, names=manifest.files.keys() - set(large))
    return large


@contextmanager
def checked_meanwhile(path: Path, manifest: Manifest, names: Collection[str]) -> Iterator[Future[None]]:
    """The hashes of some files are compared while the block reads them, which ends when that has ended.

    Raises:
        StorageError: a file has other content than was written; also where the block failed over it.
    """
    with ThreadPoolExecutor(1) as thread:
        checked = thread.submit(check_hashes, path, manifest, names=names)
        try:
            yield checked
        finally:
            checked.result()


def _read(path: Path) -> FileRecord:
    try:
        return record_of(path)
    except OSError as e:  # no permission, a broken sector
        raise StorageError(f"{path} cannot be read ({e.strerror})") from None


def intact_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are as they were written.

    Raises:
        StorageError: says what is damaged.
    """
    manifest = read_manifest(path)
    check_files(path, manifest)
    check_hashes(path, manifest)
    return manifest
