"""Rows of one or several data files, and where each of them is: every error names file and row."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dapo_megatron.data.formats import format_of, read_records
from dapo_megatron.errors import DataError

SHARDS = (".parquet", ".jsonl", ".jsonl.gz")
"""What a folder may be made of; .json is left out: it is often a description of the rest."""


class Row(NamedTuple):
    """One row and where it is."""

    path: Path
    number: int
    """From 0: line of a jsonl file (blank lines counted), row of the others."""
    fields: dict[str, Any]
    unit: str
    """What `number` counts: line or row."""
    source: str
    """Name of the file, with as many of its folders as tell it from the other files."""

    @property
    def id(self) -> str:
        """Unique among the rows that were loaded together."""
        return f"{self.source}:{self.number}"

    @property
    def place(self) -> str:
        """For messages; counts from 1, as editors do."""
        return f"{self.path}, {self.unit} {self.number + 1}"

    def value(self, field: str) -> Any:
        """The value under a dotted path: `reward_model.ground_truth`, `prompt.0.content`.

        Raises:
            DataError: no such field; the nearest one that exists is named.
        """
        value: Any = self.fields
        if field in value:  # a name with dots in it
            return value[field]
        for depth, part in enumerate(field.split(".")):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise self._missing(field, depth, value)
        return value

    def _missing(self, field: str, depth: int, value: Any) -> DataError:
        parts = field.split(".")
        at = ".".join(parts[:depth])
        names = list(value) if isinstance(value, dict) else []
        if isinstance(value, list):
            names = [str(index) for index in range(len(value))]
        if not names:
            return DataError(f"{self.place}: no field {field!r}: {at or 'the row'!r} has no fields")
        near = difflib.get_close_matches(parts[depth], names, n=1, cutoff=0.0)[0]
        nearest = ".".join([*parts[:depth], near])
        return DataError(f"{self.place}: no field {field!r}, did you mean {nearest!r}? (fields: {', '.join(names)})")


def load_rows(paths: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Row]:
    """All rows of some files, in order.

    Args:
        paths: one or several of: a file (`formats.FORMATS`), a folder written by `datasets.Dataset.save_to_disk`, or a
            folder of shards, which are read in the order of their names.
        limit: read only the first rows.

    Raises:
        DataError: missing, empty, named twice, not of its format, a record that is no JSON object.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    files = [(path, file) for path in given for file in _files_of(path)]
    names = _short_names([file for _, file in files])
    rows: list[Row] = []
    filled: set[Path] = set()
    for path, file in files:
        room = None if limit is None else limit - len(rows)
        if room == 0:
            return rows
        unit, before = format_of(file).unit, len(rows)
        records = itertools.islice(read_records(file), room)
        rows += (Row(file, number, fields, unit, names[file]) for number, fields in records)
        if len(rows) > before:
            filled.add(path)
    for path in given:
        if path not in filled:
            raise DataError(f"data file {path} has no rows")
    return rows


def _files_of(path: Path) -> list[Path]:
    """The path itself, or the shards in a folder that is no saved dataset."""
    if not path.exists():
        raise DataError(f"data file {path} does not exist")
    if not path.is_dir() or any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return [path]
    shards = sorted(p for p in path.iterdir() if p.name.endswith(SHARDS) and p.name[0] not in "._")
    if not shards:
        raise DataError(
            f"folder {path} is not a dataset written by save_to_disk, and holds no shards ({', '.join(SHARDS)})"
        )
    kinds = {re.sub(r"\d+", "0", shard.name): shard.name for shard in shards}
    if len(kinds) > 1:  # train and test side by side, or two copies of the same rows
        examples = ", ".join(list(kinds.values())[:3])
        raise DataError(
            f"folder {path}: shards are files whose names differ in numbers only, found {examples}; name the files "
            "that are meant, as a list"
        )
    return shards


def _short_names(files: list[Path]) -> dict[Path, str]:
    """The end of each path, as long as it takes to tell it from the others."""
    seen: dict[Path, Path] = {}
    for file in files:
        other = seen.setdefault(file.resolve(), file)
        if other is not file:
            raise DataError(f"data file {file} is named twice (before as {other}): its prompts would count double")
    ends = {file: file.absolute().parts for file in files}
    names: dict[Path, str] = {}
    for length in range(1, max(map(len, ends.values())) + 1):
        count = Counter(parts[-length:] for parts in ends.values())
        names = {f: "/".join(parts[-length:]) for f, parts in ends.items() if count[parts[-length:]] == 1} | names
    return names
