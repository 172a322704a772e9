"""Files of one JSON object a line, each with its `step`: appended to by a run, cut back when it resumes."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_megatron.errors import DataError


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append `row` as one line; readers see whole lines, or a torn last one after a crash."""
    append_lines(path, [row])


def append_lines(path: Path, rows: Sequence[dict[str, Any]], *, sync: bool = False) -> None:
    """Append each row as one line; with `sync`, through to the disk: a checkpoint that follows must not outlive it."""
    with path.open("a", encoding="ascii") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        if sync:
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of `path` in order, none if there is no file; a torn last line is left out.

    Raises:
        DataError: a line is no such row.
    """
    if not path.exists():
        return
    with path.open(encoding="ascii") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                yield _row(line, f"{path}, line {number}")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise DataError(f"{where}: not JSON ({e}); remove the line") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
        raise DataError(f"{where}: no object with the number of a step; remove the line")
    return row


def cut_after(path: Path, step: int | None) -> None:
    """Drop the rows of later steps than `step` (None: all rows) and a torn last line, in one atomic rename."""
    if not path.exists():
        return
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="ascii") as file:
        for row in read_lines(path):
            if step is not None and row["step"] <= step:
                file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
