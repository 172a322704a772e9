"""The manifest of a checkpoint: what it holds, where training stood, and the size and hash of every file."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import xxhash

from dapo_megatron.data.snapshot import DataCursor
from dapo_megatron.errors import ConfigError, StorageError
from dapo_megatron.weights.families import ModelShape

MANIFEST = "manifest.json"
HF = "hf"
MODEL = "model"
SCHEMA = 3

Format = Literal["dp_reshardable", "fully_reshardable", "weights"]
"""megatron-core's kind of optimizer state: loadable at another data-parallel size, or in any layout; or none at all."""
Count = Annotated[int, msgspec.Meta(ge=0)]


class FileRecord(msgspec.Struct, frozen=True):
    """One file, as the process that wrote it saw it."""

    size: Count
    """Bytes."""
    xxh3: str
    """128-bit XXH3, hexadecimal."""


class Audit(msgspec.Struct, frozen=True):
    """What must come back, by sums over the live state that do not depend on the layout (checkpoint.audit)."""

    optimizer: dict[str, int]
    """State name (param, exp_avg, exp_avg_sq, step) to its sum."""
    rng: int
    """Sum over the random states of all ranks; compared where the layout is the same."""
    cursor: DataCursor


class Manifest(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint holds."""

    schema: int = SCHEMA
    format: Format
    step: Count = 0
    """Finished rollout steps."""
    version: Count = 0
    """Policy version that was live."""
    skipped: Count = 0
    """Updates skipped in a row, up to then."""
    updates: Count = 0
    """Optimizer updates done; the schedule's position."""
    model: dict[str, Any]
    """The numbers of the model (model_numbers)."""
    dtype: str
    """Of the weights."""
    layout: dict[str, int] = {}
    """Parallel sizes it was saved under."""
    config_digest: str = ""
    """Of the run's configuration."""
    metrics: dict[str, float] = {}
    """The evaluation after its step, if there was one."""
    audit: Audit | None = None
    """None: weights alone."""
    files: dict[str, FileRecord] = {}
    """Every other file of the checkpoint, by its path in it."""
    libraries: dict[str, str] = {}
    """What wrote it."""
    digest: str = ""
    """Hash of all of the above."""


def libraries() -> dict[str, str]:
    """Versions of what decides a checkpoint's layout on disk."""
    return {name: version(name) for name in ("torch", "megatron-core", "dapo-megatron")}


def model_numbers(shape: ModelShape) -> dict[str, Any]:
    """What two models must have in common to hold the same weights, as plain values."""
    numbers = asdict(shape) | {"family": shape.family.architecture}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(numbers))
    return plain


def require_model(manifest: Manifest, path: Path, shape: ModelShape) -> None:
    """Raise ConfigError unless the checkpoint in `path` is of this model."""
    for name, ours in model_numbers(shape).items():
        if (saved := manifest.model.get(name)) != ours:
            raise ConfigError(f"{path} holds a model with {name}={saved}, the run's has {ours}")


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as a file's content, with its own hash in it."""
    signed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(signed))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`.

    Raises:
        StorageError: it is unreadable, of another schema, changed since it was written, or the folder has another name.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != SCHEMA:
            raise StorageError(f"{file} has checkpoint schema {schema}, this program reads {SCHEMA}")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.MsgspecError, RecursionError) as e:
        raise StorageError(f"{file} cannot be read ({e})") from None
    if manifest.digest != _digest(manifest):
        raise StorageError(f"{file} is damaged: its content does not have the hash that it names")
    if path.name.startswith("step_") and path.name != (name := step_name(manifest.step)):
        raise StorageError(f"{path} is the checkpoint {name} under another name: rename it, or move it away")
    return manifest


def step_name(step: int) -> str:
    """Name of the folder of the checkpoint after a step."""
    return f"step_{step:06d}"


class _Schema(msgspec.Struct):
    schema: int


def _digest(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(manifest, digest="")))
