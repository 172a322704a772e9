"""A distributed checkpoint -> a Hugging Face folder, in one process, a parameter in memory at a time.

The checkpoint is a converted one or one of a run, saved under any layout; the optimizer's state is not read. A
converted one gives the files of its source again, byte for byte: its layout.json holds their headers.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from dapo_megatron.checkpoint.conversion import output
from dapo_megatron.checkpoint.conversion.output import Aside, Part
from dapo_megatron.checkpoint.conversion.stored_keys import Place, account, places
from dapo_megatron.checkpoint.conversion.stored_weights import StoredWeights
from dapo_megatron.checkpoint.integrity import check_small, checked_meanwhile
from dapo_megatron.checkpoint.manifest import HF, MANIFEST, MODEL, Manifest, model_numbers, read_manifest
from dapo_megatron.checkpoint.store import copy_files, write_synced
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.observe.progress import progress
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import INDEX, SINGLE, HfFolder, is_weights_name, side_files
from dapo_megatron.weights.hf_writer import (
    HfWriter,
    TensorEntry,
    index_text,
    parse_header,
    plain_layout,
    relaid,
    source_layout,
)
from dapo_megatron.weights.table import ParameterMapping, from_shards, hf_shapes, row_ranges

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert_dist_to_hf(
    checkpoint: Path, out: Path, dtype: torch.dtype | None, like: Path | None, console: Console
) -> int:
    """Convert and publish `out`; goes on where an interrupted call with the same arguments was.

    Args:
        dtype: type of all weights; None keeps what is stored.
        like: folder with config.json, tokenizer and so on, in place of the checkpoint's own; where it has weights, they
            say which tensor goes into which file.

    Returns:
        Bytes of weights that were written.

    Raises:
        DapoError: the checkpoint is damaged or of another model, or `out` cannot be made.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise ConfigError(
            f"{checkpoint} has no {MANIFEST}: give one checkpoint, such as runs/demo/checkpoints/step_000010"
        )
    output.require_outside(out, checkpoint, *([like] if like else []))
    manifest = read_manifest(checkpoint)
    large = check_small(checkpoint, manifest)
    sides = like or checkpoint / HF
    if not (sides / "config.json").is_file():
        raise ConfigError(f"{sides} has no config.json: give a Hugging Face folder of the same model with --like")
    shape, weights = read_model(sides), StoredWeights(checkpoint / MODEL)
    _require_model(manifest, checkpoint, shape, sides)
    weights.check(shape)
    table = places(shape)
    account(table, shape)
    recorded = _recorded_layout(checkpoint / output.LAYOUT)
    before = recorded if like is None else _layout_in(like)
    layout = _layout(table, shape, weights, before, recorded, dtype)
    names = [n for n in side_files(sides) if n != INDEX or layout == before]
    inputs = output.stamps(sides, [*names, *(before if like else ())], f"{sides}/") | output.stamps(
        checkpoint, [MANIFEST]
    )
    options = {"dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."), "to": "hf"}
    with (
        output.written_aside(out, inputs, options) as aside,
        checked_meanwhile(checkpoint, manifest, large) as checked,
    ):
        written = _write(aside, layout, table, shape, weights, checked, console)
        copy_files(sides, names, aside.path)
        if layout.keys() != {SINGLE} and INDEX not in names:
            write_synced(aside.path / INDEX, index_text(layout).encode())
        types = {entry.dtype for header in layout.values() for entry in parse_header(header).values()}
        if len(types) == 1 and layout != before:
            output.set_config_dtype(aside.path / "config.json", types.pop())
    return written


def _require_model(manifest: Manifest, checkpoint: Path, shape: ModelShape, sides: Path) -> None:
    ours = model_numbers(shape)
    for name, value in ours.items():
        if manifest.model.get(name) != value:
            raise ConfigError(f"{checkpoint} holds a model with {name}={manifest.model.get(name)}, {sides} has {value}")


def _layout_in(folder: Path) -> dict[str, str]:
    """{file: header} of a folder's weights; empty where it has none."""
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        return {}
    return source_layout(HfFolder(folder))


def _recorded_layout(path: Path) -> dict[str, str]:
    """{file: header} of what was converted; empty for the checkpoint of a run."""
    if not path.exists():
        return {}
    try:
        layout = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.MsgspecError as e:
        raise DapoError(f"{path} is damaged ({e}): use another checkpoint") from None
    for file in layout:
        if not is_weights_name(file):
            raise DapoError(
                f"{path} names {file[:100]!r}, which is no safetensors file in a folder: use another checkpoint"
            )
    return layout


def _layout(
    table: list[tuple[ParameterMapping, Place]],
    shape: ModelShape,
    weights: StoredWeights,
    before: dict[str, str],
    recorded: dict[str, str],
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """{file: header} of the output."""
    stored = {name: weights.dtype(place) for mapping, place in table for name in mapping.hf}
    sizes = {n: s for mapping, _ in table for n, s in zip(mapping.hf, hf_shapes(mapping, shape), strict=True)}
    known = _entries(before)
    if shape.tied and HEAD in known:
        stored[HEAD], sizes[HEAD] = stored[EMBEDDING], sizes[EMBEDDING]
    # What is recorded beside the weights is their type: one stored tensor holds layers that may differ in theirs.
    own = {name: entry.dtype for name, entry in _entries(recorded).items()}
    types = {name: dtype or own.get(name, kind) for name, kind in stored.items()}
    if {name: known[name].shape for name in types if name in known} != sizes:
        return plain_layout({name: (types[name], sizes[name]) for name in sizes})
    return {file: relaid(header, types) for file, header in before.items()}


def _entries(layout: dict[str, str]) -> dict[str, TensorEntry]:
    return {name: entry for header in layout.values() for name, entry in parse_header(header).items()}


def _write(
    aside: Aside,
    layout: Mapping[str, str],
    table: list[tuple[ParameterMapping, Place]],
    shape: ModelShape,
    weights: StoredWeights,
    checked: Future[None],
    console: Console,
) -> int:
    """Nothing is written down as done before the files that it comes from are checked."""
    total = sum(entry.size for header in layout.values() for entry in parse_header(header).values())
    there = sum(part.size for part in aside.journal.done.values())
    output.require_room(aside.path, total - there)
    writer = HfWriter(aside.path, layout)
    done = set(aside.journal.done)
    try:
        for name in done:
            if name not in writer.entries or writer.digest_on_disk(name) != aside.journal.done[name].xxh3:
                raise aside.differs(f"{name} is not what was written")
        with progress("converting", total, console, there) as advance, ThreadPoolExecutor(1) as thread:
            settled: list[Future[None]] = []
            pending: dict[str, Part] = {}
            for name, row, block in output.one_ahead(_blocks(table, shape, weights, done)):
                for target in [name, HEAD] if name == EMBEDDING and shape.tied and HEAD in writer.entries else [name]:
                    writer.write(target, block, row)
                    advance(block.numel() * writer.entries[target].dtype.itemsize)
                    if row + len(block) == writer.entries[target].shape[0]:
                        pending[target] = Part(writer.entries[target].size, writer.digest(target))
                if sum(part.size for part in pending.values()) >= output.JOURNAL_EVERY and checked.done():
                    checked.result()
                    settled.append(thread.submit(_settle, aside, writer, pending))
                    pending = {}
            checked.result()
            settled.append(thread.submit(_settle, aside, writer, pending))
            for past in settled:
                past.result()
        if missing := writer.entries.keys() - aside.journal.done.keys():
            raise DapoError(f"{aside.path}: {sorted(missing)[0]} was not written")
    finally:
        writer.close()
    return total


def _settle(aside: Aside, writer: HfWriter, written: dict[str, Part]) -> None:
    writer.sync()
    aside.record(written)


def _blocks(
    table: list[tuple[ParameterMapping, Place]], shape: ModelShape, weights: StoredWeights, done: set[str]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """(Hugging Face tensor, first row, rows) of all that is not done, in the order of the table."""
    for mapping, place in table:
        if mapping.kind == "qkv" and not done.issuperset(mapping.hf):
            for name, tensor in zip(mapping.hf, from_shards(mapping, shape, [weights.parameter(place)]), strict=True):
                if name not in done:
                    yield name, 0, tensor
        for name, first, end in row_ranges(mapping, shape):
            if name not in done:
                for row, block in weights.row_blocks(place, first, end):
                    yield name, row - first, block
