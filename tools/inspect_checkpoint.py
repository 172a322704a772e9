"""Look into checkpoints: what they hold, whether they are intact, where two of them differ."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapo_megatron.checkpoint.inspect import differences, stored_tensors
from dapo_megatron.checkpoint.integrity import check_files, check_hashes
from dapo_megatron.checkpoint.manifest import MANIFEST, MODEL, Manifest, read_manifest
from dapo_megatron.checkpoint.safe_metadata import check_objects
from dapo_megatron.checkpoint.store import published
from dapo_megatron.errors import ConfigError, StorageError, exit_code
from dapo_megatron.run_folder import RunFolder

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="Examples:  python tools/inspect_checkpoint.py runs/demo --verify   |   "
    "python tools/inspect_checkpoint.py runs/demo/checkpoints/step_000030 --tensors   |   "
    "python tools/inspect_checkpoint.py --diff runs/a/checkpoints/step_000030 runs/b/checkpoints/step_000030"
)
def command(
    paths: Annotated[list[Path], typer.Argument(help="Checkpoints, or run folders for all checkpoints in them.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file; exit code 1 if one is damaged.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Compare two checkpoints, bit for bit; exit code 1 where they differ.")
    ] = False,
) -> None:
    """Show what checkpoints hold: step, version, format, layout, size, evaluation, what wrote them."""
    found = [checkpoint for path in paths for checkpoint in _checkpoints(path)]
    if diff:
        if len(found) != 2:
            raise ConfigError(f"--diff compares two checkpoints, {len(found)} were given")
        raise typer.Exit(_diff(*found))
    console, damaged = Console(soft_wrap=True), 0
    for path in found:
        try:
            manifest = read_manifest(path)
            console.print(_summary(path, manifest))
            if verify:
                console.print(_verify(path, manifest), markup=False)
        except StorageError as e:
            damaged += 1
            print(f"damaged: {e}")
            continue
        if tensors:
            console.print(_tensors(path))
    if damaged:
        raise typer.Exit(1)


def _checkpoints(path: Path) -> list[Path]:
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        return [path]
    if not (found := published(RunFolder(path))):
        raise ConfigError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
    return found


def _summary(path: Path, manifest: Manifest) -> Table:
    table = Table(title=Text(str(path)), show_header=False)
    size = sum(record.size for record in manifest.files.values())
    rows = {
        "format": manifest.format,
        "model": f"{manifest.model.get('family')}, {manifest.model.get('layers')} layers, {manifest.dtype}",
        "step, policy version": f"{manifest.step}, {manifest.version}",
        "updates": f"{manifest.updates}, the last {manifest.skipped} skipped" if manifest.skipped else manifest.updates,
        "saved under": " ".join(f"{name}={size}" for name, size in manifest.layout.items()) or "no layout",
        "evaluation": " ".join(f"{name}={value:.4g}" for name, value in manifest.metrics.items()) or "none",
        "data": _cursor(manifest),
        "size": f"{size / 1e9:.3f} GB in {len(manifest.files)} files",
        "config digest": manifest.config_digest or "none",
        "written by": " ".join(f"{name} {version}" for name, version in manifest.libraries.items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def _cursor(manifest: Manifest) -> str:
    if manifest.audit is None:
        return "none: weights alone"
    cursor = manifest.audit.cursor
    return (
        f"epoch {cursor.epoch}, {cursor.position} prompts of it given out, {cursor.next_order} groups issued, "
        f"{cursor.carried} carried"
    )


def _verify(path: Path, manifest: Manifest) -> str:
    began = time.monotonic()
    check_files(path, manifest)
    check_hashes(path, manifest)
    check_objects(path / MODEL)
    size, seconds = sum(record.size for record in manifest.files.values()), time.monotonic() - began
    return f"intact: {len(manifest.files)} files, {size / 1e9:.3f} GB hashed in {seconds:.1f} s"


def _tensors(path: Path) -> Table:
    table = Table("tensor", "shape", "type", "bytes", "pieces")
    for tensor in stored_tensors(path):
        kind = str(tensor.dtype).removeprefix("torch.")
        shape = "x".join(map(str, tensor.shape))
        table.add_row(Text(tensor.name), shape, kind, f"{tensor.size:,}", str(tensor.chunks))
    return table


def _diff(a: Path, b: Path) -> int:
    lines = 0
    for line in differences(a, b):
        lines += 1
        print(line, flush=True)
    if not lines:
        print(f"every tensor is the same, bit for bit: {len(stored_tensors(a))} tensors")
    return int(lines > 0)


def main() -> None:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    sys.exit(exit_code(app))


if __name__ == "__main__":
    main()
