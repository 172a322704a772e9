"""A Hugging Face folder -> a distributed checkpoint that a trainer of any layout loads."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dapo_megatron.errors import exit_code
from dapo_megatron.process import importing, leave

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example:  python tools/convert_hf_to_dist.py models/smollm2 checkpoints/smollm2")
def command(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of all weights; without it each tensor keeps its own."),
    ] = None,
) -> None:
    """Convert a Hugging Face folder to a distributed checkpoint of its weights.

    An interrupted conversion goes on where it was when it is called again.
    """
    with importing():
        import torch

        from dapo_megatron.checkpoint.conversion.hf_to_dist import convert_hf_to_dist

    try:
        size = convert_hf_to_dist(source, out, getattr(torch, dtype) if dtype else None, Console(stderr=True))
    except KeyboardInterrupt:
        print("interrupted: call it again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{out}: {size / 1e9:.2f} GB of weights")


def main() -> int:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    return exit_code(app)


if __name__ == "__main__":
    leave(main())
