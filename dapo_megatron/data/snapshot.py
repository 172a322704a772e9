"""The controller's state between two steps, as a checkpoint keeps it: JSON, looked through before it is used.

It belongs to the batch of `step`. Whoever goes on from it issues again what was with the engines then, under the same
numbers, and everything that was issued later, because the cursor stands before it.
"""

import math
from collections.abc import Sequence

import msgspec
import xxhash

from dapo_megatron.arrays import decode_array, encode_array
from dapo_megatron.data.sampler import SamplerState
from dapo_megatron.errors import ConfigError
from dapo_megatron.records import Prompt, ScoredGroup

SCHEMA = 4
PART_BYTES = 64 << 20


class Snapshot(msgspec.Struct):
    """The data cursor, the next order number and the groups that no batch has taken yet."""

    step: int
    """The step whose batch it belongs to; 0 before the first."""
    sampler: SamplerState
    next_order: int
    share: tuple[float, float]
    """(groups kept, groups seen) lately, with weights: how many are issued for one that is wanted."""
    carried: list[ScoredGroup]
    again: list[tuple[int, str]]
    """(order, prompt id) of groups that must be issued again: they became stale, or were with the engines."""
    data: str = ""
    """Hash of the prompts in their order (data_digest)."""
    schema: int = SCHEMA


class _Schema(msgspec.Struct):
    """What is read first: another schema's groups cannot be."""

    schema: int


class DataCursor(msgspec.Struct, frozen=True):
    """Where a snapshot stands: what a manifest says of it, so that one who restores it can compare."""

    step: int
    epoch: int
    position: int
    """Prompts of this epoch that were given out."""
    next_order: int
    carried: int
    """Groups carried into the next step."""
    again: int
    """Groups that wait to be issued again."""


def data_digest(prompts: Sequence[Prompt]) -> str:
    """Hash of prompts and ground truths in the order of the files, hexadecimal."""
    digest, encoder = xxhash.xxh3_128(), msgspec.msgpack.Encoder()
    for prompt in prompts:
        digest.update(encoder.encode(prompt))
    return digest.hexdigest()


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """As JSON; every number comes back bit for bit."""
    return msgspec.json.encode(snapshot, enc_hook=encode_array)


def snapshot_parts(data: bytes) -> list[memoryview]:
    """An encoded snapshot in pieces that can be sent; joined, they are it again."""
    view = memoryview(data)
    return [view[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]


def decode_snapshot(data: bytes, step: int) -> Snapshot:
    """The snapshot that belongs to the batch of `step`.

    Raises:
        ConfigError: it is cut short, of another step or schema, or holds what cannot be.
    """
    try:
        if (schema := msgspec.json.decode(data, type=_Schema).schema) != SCHEMA:
            raise _refused(f"its schema is {schema}, this program reads {SCHEMA}")
        snapshot = msgspec.json.decode(data, type=Snapshot, dec_hook=decode_array)
    except (msgspec.MsgspecError, RecursionError) as e:
        raise _refused(f"it cannot be read ({e}; {len(data)} bytes)") from None
    if problem := _problem(snapshot, step):
        raise _refused(problem)
    return snapshot


def cursor_of(data: bytes, step: int) -> DataCursor:
    """Where the snapshot of `step` stands.

    Raises:
        ConfigError: as decode_snapshot.
    """
    s = decode_snapshot(data, step)
    return DataCursor(s.step, s.sampler.epoch, s.sampler.position, s.next_order, len(s.carried), len(s.again))


def _refused(problem: str) -> ConfigError:
    return ConfigError(f"the checkpoint's controller state is damaged: {problem}; resume from another checkpoint")


def _problem(s: Snapshot, step: int) -> str | None:
    sampler = s.sampler
    if s.step != step:
        return f"it is of step {s.step}, the checkpoint is of step {step}"
    if sampler.size < 1 or sampler.epoch < 0 or not 0 <= sampler.position <= sampler.size:
        return f"its cursor stands at prompt {sampler.position} of {sampler.size} in epoch {sampler.epoch}"
    # Every new number takes one prompt from the sampler.
    if s.next_order != sampler.epoch * sampler.size + sampler.position:
        return (
            f"{s.next_order} prompts were issued, the cursor stands at prompt {sampler.position} of {sampler.size} in "
            f"epoch {sampler.epoch}"
        )
    kept, seen = s.share
    if not (math.isfinite(seen) and 0 <= kept <= seen and seen > 0):
        return f"it counts {kept} groups kept of {seen}"
    waiting = [g.order for g in s.carried] + [order for order, _ in s.again]
    if len(set(waiting)) < len(waiting) or not all(0 <= order < s.next_order for order in waiting):
        return f"of {s.next_order} prompts issued, numbers {waiting} wait"
    for group in s.carried:
        if not group.responses or any(not r.token_ids.size or not r.version_spans for r in group.responses):
            return f"group {group.order} is carried without responses"
    return None
