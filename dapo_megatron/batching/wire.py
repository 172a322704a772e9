"""Batches as bytes: a step travels in parts, each with some of the micro-batches of one replica in one update.

A part has the sequences' own data alone, 8 bytes a token; whoever trains them derives labels, positions and weights
by packing. A file holds all parts of a step, each after its length and XXH3 checksum.
"""

import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import xxhash

from dapo_megatron.arrays import decode_array, encode_array
from dapo_megatron.batching.batch import MiniBatch, Shard, StepBatch
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.errors import DapoError

SCHEMA = 4
PART_TOKENS = 1 << 20
"""Most tokens of a part, where a micro-batch is not longer: 8 MiB, which hold an event loop up for milliseconds."""
_PREFIX = struct.Struct("<QQ")
"""Bytes of a part, and their XXH3 (64 bits)."""


class Place(msgspec.Struct, frozen=True):
    """Where a part belongs; numbers are from 0."""

    step: int
    version: int
    update: int
    updates: int
    replica: int
    replicas: int
    part: int
    parts: int
    """Of this replica in this update."""


class _Sequence(msgspec.Struct, array_like=True):
    """A TrainingSample as it travels."""

    token_ids: np.ndarray
    prompt_length: int
    loss_mask: np.ndarray
    logprobs: np.ndarray
    advantage: float
    weight: float
    source: tuple[str, int]


class _Part(msgspec.Struct):
    place: Place
    micro_batches: list[list[_Sequence]]
    schema: int = SCHEMA


class _Header(msgspec.Struct):
    schema: int


def cut(shard: Shard, limit: int = PART_TOKENS) -> list[Shard]:
    """Its parts: consecutive micro-batches of at most `limit` tokens together, or one alone."""
    parts: list[Shard] = []
    tokens = 0
    for micro_batch in shard:
        own = sum(sample.length for sample in micro_batch)
        if not parts or tokens + own > limit:
            parts.append([])
            tokens = 0
        parts[-1].append(micro_batch)
        tokens += own
    return parts


def encode_part(place: Place, micro_batches: Shard) -> bytes:
    """A part as bytes."""
    part = _Part(place, [[_travelling(sample) for sample in micro_batch] for micro_batch in micro_batches])
    return msgspec.msgpack.encode(part, enc_hook=encode_array)


def decode_part(data: bytes | memoryview) -> tuple[Place, Shard]:
    """Where a part belongs, and its micro-batches.

    Raises:
        DapoError: the bytes are truncated, hold something else, or are of another schema version.
    """
    try:
        if (schema := msgspec.msgpack.decode(data, type=_Header).schema) != SCHEMA:
            raise DapoError(
                f"the batch has schema {schema}, this program reads {SCHEMA}: use the version that wrote it"
            )
        part = msgspec.msgpack.decode(data, type=_Part, dec_hook=decode_array)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DapoError(f"{len(data)} bytes are no part of a batch: {e}") from None
    return part.place, [[_arrived(sequence) for sequence in micro_batch] for micro_batch in part.micro_batches]


def write_parts(path: Path, parts: Iterable[bytes], *, append: bool = False) -> None:
    """Write a file of parts anew, or add to one.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if append else "wb") as file:
        for data in parts:
            file.write(_PREFIX.pack(len(data), xxhash.xxh3_64_intdigest(data)))
            file.write(data)


def read_step_batch(path: Path) -> StepBatch:
    """The batch that a file of parts holds; metrics are not kept.

    Raises:
        DapoError: parts are missing, torn, damaged, there twice, of different steps or of another schema version.
        OSError: it cannot be read.
    """
    found: dict[Place, Shard] = {}
    with path.open("rb") as file:
        for data, is_whole in _records(file):
            if not is_whole:
                raise DapoError(
                    f"{path} is damaged, or older than this program, which reads schema {SCHEMA}: part {len(found)} "
                    "has not the hash that was written with it"
                )
            try:
                place, micro_batches = decode_part(data)
            except DapoError as e:
                raise DapoError(f"{path}, part {len(found)}: {e}") from None
            if place in found:
                raise DapoError(f"{path} has part {place.part} of update {place.update}, replica {place.replica} twice")
            found[place] = micro_batches
    if not found:
        raise DapoError(f"{path} holds no part of a batch")
    if len({(place.step, place.version, place.updates, place.replicas) for place in found}) > 1:
        raise DapoError(f"{path} holds parts of different batches")
    first = next(iter(found))
    parts = {(place.update, place.replica): place.parts for place in found}
    mini_batches = [MiniBatch([[] for _ in range(first.replicas)]) for _ in range(first.updates)]
    for update, replica in itertools.product(range(first.updates), range(first.replicas)):
        count = parts.get((update, replica), 0)
        places = [
            msgspec.structs.replace(first, update=update, replica=replica, part=p, parts=count) for p in range(count)
        ]
        if not count or not all(place in found for place in places):
            raise DapoError(f"{path} is cut short: it has not all parts of update {update}, replica {replica}")
        mini_batches[update].shards[replica] = [batch for place in places for batch in found.pop(place)]
    if found:
        raise DapoError(f"{path} holds a part that no batch of {first.updates} updates has")
    return StepBatch(first.step, first.version, mini_batches)


def require_tokens(batch: StepBatch, vocab: int, path: Path) -> None:
    """Raise DapoError unless a model with `vocab` tokens has all those of the batch that `path` holds."""
    samples = (s for mini in batch.mini_batches for shard in mini.shards for micro in shard for s in micro)
    largest = max((int(np.max(s.token_ids)) for s in samples), default=0)
    if largest >= vocab:
        raise DapoError(f"{path} has token {largest}, the model has {vocab}: give the run's own with model.path=")


def _records(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Each part's bytes, and whether they are those that were written."""
    size = os.fstat(file.fileno()).st_size
    while head := file.read(_PREFIX.size):
        length, checksum = _PREFIX.unpack(head.ljust(_PREFIX.size, b"\0"))
        data = file.read(min(length, size))
        yield data, len(data) == length and xxhash.xxh3_64_intdigest(data) == checksum


def _travelling(s: TrainingSample) -> _Sequence:
    return _Sequence(
        np.asarray(s.token_ids, np.int32),
        s.prompt_length,
        np.asarray(s.loss_mask, np.bool_),
        np.asarray(s.logprobs, np.float32),
        s.advantage,
        s.weight,
        s.source,
    )


def _arrived(s: _Sequence) -> TrainingSample:
    responses = len(s.token_ids) - s.prompt_length
    if s.prompt_length < 1 or not len(s.loss_mask) == len(s.logprobs) == responses:
        raise DapoError(
            f"a sequence of {len(s.token_ids)} tokens, {s.prompt_length} of them prompt, has {len(s.loss_mask)} truth "
            f"values and {len(s.logprobs)} log-probs: damaged, or written by another program"
        )
    return TrainingSample(s.token_ids, s.prompt_length, s.loss_mask, s.logprobs, s.advantage, s.weight, s.source)
