"""Make addition questions for a pretrained model: one- and two-digit numbers mixed, as jsonl files."""

import json
import random
import sys
from pathlib import Path
from typing import Annotated

import typer

from dapo_megatron.errors import DapoError, exit_code

RANGES = (range(1, 10), range(10, 100))
"""One-digit and two-digit numbers; both numbers of a question are of the same kind."""
ONE_DIGIT_HELD_OUT = 16
"""Of the 81 one-digit questions, kept out of the training file."""


def make(out: Path, train: int = 2000, held_out: int = 200, seed: int = 0) -> None:
    """Write train.jsonl and eval.jsonl into `out`: half of each one-digit questions, none in both.

    One-digit questions come several times, because there are few of them.

    Raises:
        DapoError: a count that cannot be.
    """
    two_digit = [(a, b) for a in RANGES[1] for b in RANGES[1]]
    if train < 1 or held_out < 1 or (train + held_out) // 2 > len(two_digit):
        raise DapoError(f"cannot make {train} + {held_out} questions: give at least 1 each, at most 16000 together")
    rng = random.Random(seed)
    one_digit = [(a, b) for a in RANGES[0] for b in RANGES[0]]
    rng.shuffle(one_digit)
    rng.shuffle(two_digit)
    pools = {
        "eval": (one_digit[:ONE_DIGIT_HELD_OUT], two_digit[: held_out // 2]),
        "train": (one_digit[ONE_DIGIT_HELD_OUT:], two_digit[held_out // 2 :]),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, count in (("eval", held_out), ("train", train)):
        ones, twos = pools[name]
        questions = [ones[i % len(ones)] for i in range(count - count // 2)] + twos[: count // 2]
        rng.shuffle(questions)
        rows = (json.dumps({"prompt": f"{a} + {b} =", "answer": str(a + b)}) for a, b in questions)
        (out / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        print(f"{out / name}.jsonl: {count} questions")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example:  python tools/make_addition.py models/addition")
def command(
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl and eval.jsonl.")],
    train: Annotated[int, typer.Option(help="Training questions.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Held-out questions.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the choice and the order.")] = 0,
) -> None:
    """Write addition questions `a + b =`, half of one digit and half of two; the same again with the same seed."""
    make(out, train, held_out, seed)


def main() -> None:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    sys.exit(exit_code(app))


if __name__ == "__main__":
    main()
