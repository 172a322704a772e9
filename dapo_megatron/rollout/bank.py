"""The rollout bank: groups of the step in progress, kept in the run folder as they are finished.

A step's generation takes a quarter of an hour, and the checkpoint before it holds none of it. Whoever goes on from that
checkpoint takes the finished groups back instead of generating them again:

    issued (order, prompt)   in the bank, same prompt, of versions that may be trained now   -> taken back
                             else                                                            -> generated, then added

One file a step, bank/step_000012.bank: a record that says what the responses depend on, then one a group; each is
length, XXH3 checksum and MessagePack. It is a saving and no state: a torn tail is cut, and a disk that refuses costs
the saving, not the run. Nothing is synced to the disk: what was written survives the process, a lost node tears the
tail.
"""

import errno
import hashlib
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import xxhash

from dapo_megatron.arrays import decode_array, encode_array
from dapo_megatron.checkpoint.store import published, step_of
from dapo_megatron.config import RunConfig
from dapo_megatron.records import SCHEMA, Prompt, ScoredGroup
from dapo_megatron.run_folder import RunFolder

log = logging.getLogger(__name__)

_PREFIX = struct.Struct("<QQ")
"""Bytes of the payload, and their XXH3 (64 bits)."""
_encoder = msgspec.msgpack.Encoder(enc_hook=encode_array)
_NAME = re.compile(r"step_(\d{6,})\.bank")


class _Header(msgspec.Struct):
    """First record: a file with another one is of no use."""

    schema: int
    step: int
    digest: str


class _Order(msgspec.Struct):
    """What is read of a group until it is asked for."""

    order: int


def responses_digest(config: RunConfig) -> str:
    """Of everything in the config that a response, its verdict or its reward depends on."""
    chosen = config.model_dump(
        include={
            "seed": True,
            "model": True,
            "data": True,
            "algorithm": True,
            "rollout": True,
            "grading": True,
            "engine": {"dtype", "deterministic"},
        },
        exclude={"rollout": {"bank_bytes", "concurrency", "request_timeout_s"}, "grading": {"workers"}},
    )
    return hashlib.sha256(msgspec.json.encode(chosen, order="deterministic")).hexdigest()


class RolloutBank:
    """The files of one run; the controller owns them."""

    def __init__(self, folder: RunFolder, digest: str, limit: int, resume_step: int):
        """
        Args:
            digest: of what the responses depend on (`responses_digest`).
            limit: bytes that all files may take together; 0 is no bank.
            resume_step: step of the checkpoint the run goes on from; 0: from its beginning. What belongs to any other
                step than the next one is of a history that is given up, and removed.
        """
        self._folder, self._digest, self._limit = folder, digest, limit
        self._file: BinaryIO | None = None
        self._adds = False
        self._path, self._room, self._end = folder.banks, 0, 0
        self._buffer = bytearray(_PREFIX.size)
        self._places: dict[int, tuple[int, int]] = {}
        self._versions = range(0)
        self.taken = 0
        """Groups of this step that were taken back."""
        self.missed = 0
        """Groups of this step that could not be added."""
        self._remove({resume_step + 1})

    def begin_step(self, step: int, versions: range) -> None:
        """Open the file of a step, with what an earlier start of the run has left there.

        Args:
            versions: policy versions whose tokens may be trained in this step.
        """
        self.close()
        self.taken = self.missed = 0
        self._places, self._versions, self._adds = {}, versions, True
        if self._limit == 0:
            return
        self._path = self._folder.bank(step)
        try:
            # A checkpoint that is being written may be published while the next step is generated.
            newest = _newest_checkpoint(self._folder)
            self._remove({s for s in (step, step - 1, newest + 1) if s > newest})
            self._path.parent.mkdir(parents=True, exist_ok=True)
            others = sum(p.stat().st_size for _, p in _files(self._folder) if p != self._path)
            self._room = self._limit - others
            self._file = self._path.open("a+b", buffering=0)
            self._recover(_Header(SCHEMA, step, self._digest))
        except OSError as e:
            self._give_up(e)

    def holds(self, order: int) -> bool:
        """Whether a group of this number was finished, and has not been taken back."""
        return order in self._places

    def take(self, order: int, prompt: Prompt) -> ScoredGroup | None:
        """The finished group of an issued prompt, if there is one that may be trained."""
        place = self._places.pop(order, None)
        if place is None or self._file is None:
            return None
        try:
            group = msgspec.msgpack.decode(self._read(place), type=ScoredGroup, dec_hook=decode_array)
        except OSError as e:
            self._give_up(e)
            return None
        sampled = {span.version for response in group.responses for span in response.version_spans}
        if group.prompt != prompt or not all(version in self._versions for version in sampled):
            return None
        self.taken += 1
        return group

    def add(self, group: ScoredGroup) -> None:
        """Keep a finished group; where there is no room, or the disk refuses, it is counted as missed."""
        if self._limit == 0:
            return
        if self._adds:
            record = self._record(group)
            if self._end + len(record) > self._room:
                self._stop_adding(f"rollout.bank_bytes={self._limit} are full")
            else:
                try:
                    self._write(record)
                except OSError as e:
                    self._give_up(e)
        self.missed += not self._adds

    def end(self) -> None:
        """Close the bank, and remove what the published checkpoints have made useless."""
        self.close()
        newest = _newest_checkpoint(self._folder)
        self._remove({step for step, _ in _files(self._folder) if step > newest})

    def close(self) -> None:
        """Close the file of the step."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _record(self, content: _Header | ScoredGroup) -> bytearray:
        # One buffer for all groups: a new one of megabytes costs as much as encoding into it.
        _encoder.encode_into(content, self._buffer, _PREFIX.size)
        with memoryview(self._buffer)[_PREFIX.size :] as payload:
            _PREFIX.pack_into(self._buffer, 0, len(payload), xxhash.xxh3_64_intdigest(payload))
        return self._buffer

    def _write(self, record: bytearray) -> None:
        assert self._file is not None
        written = self._file.write(record)
        if written != len(record):  # a disk that fills up takes a part
            self._file.truncate(self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._end += len(record)

    def _recover(self, header: _Header) -> None:
        """Find the groups of the file; begin it anew where it is of other responses."""
        assert self._file is not None
        size, records = os.fstat(self._file.fileno()).st_size, _records(self._file)
        first = next(records, None)
        if first is None or _header(self._read(first)) != header:
            if size:
                log.warning(
                    "%s is of another config or version, or damaged: its groups are generated again", self._path
                )
            self._file.truncate(0)
            self._end = 0
            self._write(self._record(header))
            return
        self._end = sum(first)
        for start, length in records:
            order = msgspec.msgpack.decode(self._read((start, length)), type=_Order).order
            self._places[order] = (start, length)
            self._end = start + length
        if self._end < size:
            log.warning("%s: its last %d bytes are torn or damaged, and cut", self._path, size - self._end)
            self._file.truncate(self._end)
        log.info("%s: %d finished groups", self._path, len(self._places))

    def _read(self, place: tuple[int, int]) -> bytes:
        assert self._file is not None
        return os.pread(self._file.fileno(), place[1], place[0])

    def _give_up(self, error: OSError) -> None:
        self._stop_adding(f"{error.strerror or error}: make room, or check that the folder is there and writable")

    def _stop_adding(self, reason: str) -> None:
        """What is there can still be taken."""
        if self._adds:
            log.warning("%s: no more groups of this step are kept for a resume (%s)", self._path, reason)
        self._adds = False

    def _remove(self, but: set[int]) -> None:
        for step, path in _files(self._folder):
            if step not in but:
                path.unlink(missing_ok=True)


def _records(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of the payloads, up to the first that is torn or damaged."""
    handle, start = file.fileno(), 0
    size = os.fstat(handle).st_size
    while start + _PREFIX.size <= size:
        length, checksum = _PREFIX.unpack(os.pread(handle, _PREFIX.size, start))
        start += _PREFIX.size
        if start + length > size or xxhash.xxh3_64_intdigest(os.pread(handle, length, start)) != checksum:
            return
        yield start, length
        start += length


def _header(payload: bytes) -> _Header | None:
    try:
        return msgspec.msgpack.decode(payload, type=_Header)
    except msgspec.MsgspecError:
        return None


def _files(folder: RunFolder) -> list[tuple[int, Path]]:
    """(step, path) of each file of the bank."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.banks.glob("*.bank"))
    return [(int(match[1]), path) for match, path in found if match]


def _newest_checkpoint(folder: RunFolder) -> int:
    """Its step; 0 where there is none."""
    found = published(folder)
    return step_of(found[-1]) if found else 0
