"""A distributed checkpoint, of a run or a converted one -> a Hugging Face folder."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dapo_megatron.errors import exit_code
from dapo_megatron.process import importing, leave

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="Example:  python tools/convert_dist_to_hf.py "
    "runs/demo/checkpoints/step_000030 models/trained --like demo/model"
)
def command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of one checkpoint, whatever its layout was.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of all weights; without it each tensor keeps its own."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder of the same model, whose config.json, tokenizer and so on to take."),
    ] = None,
) -> None:
    """Convert the weights of a distributed checkpoint to a Hugging Face folder.

    An interrupted conversion goes on where it was when it is called again.
    """
    with importing():
        import torch

        from dapo_megatron.checkpoint.conversion.dist_to_hf import convert_dist_to_hf

    try:
        size = convert_dist_to_hf(checkpoint, out, getattr(torch, dtype) if dtype else None, like, Console(stderr=True))
    except KeyboardInterrupt:
        print("interrupted: call it again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{out}: {size / 1e9:.2f} GB of weights")


def main() -> int:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    return exit_code(app)


if __name__ == "__main__":
    leave(main())
