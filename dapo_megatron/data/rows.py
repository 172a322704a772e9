"""Rows of a data file: jsonl, parquet or a Hugging Face dataset on disk; every error names file and row."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from dapo_megatron.errors import DapoError

FileFormat = Literal["auto", "jsonl", "parquet", "dataset"]


class Row(NamedTuple):
    """One row and where it is."""

    path: Path
    number: int
    """From 0: line of a jsonl file (blank lines counted), row of the others."""
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """For messages; counts from 1, as editors do."""
        return f"{self.path}, {'line' if self.path.is_file() else 'row'} {self.number + 1}"

    def value(self, field: str) -> Any:
        """The value under a dotted path: `reward_model.ground_truth`, `prompt.0.content`.

        Raises:
            DapoError: no such field; the nearest one that exists is named.
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

    def _missing(self, field: str, depth: int, value: Any) -> DapoError:
        parts = field.split(".")
        at = ".".join(parts[:depth])
        names = list(value) if isinstance(value, dict) else []
        if isinstance(value, list):
            names = [str(index) for index in range(len(value))]
        if not names:
            return DapoError(f"{self.place}: no field {field!r}: {at or 'the row'!r} has no fields")
        near = difflib.get_close_matches(parts[depth], names, n=1, cutoff=0.0)[0]
        nearest = ".".join([*parts[:depth], near])
        return DapoError(f"{self.place}: no field {field!r}, did you mean {nearest!r}? (fields: {', '.join(names)})")


def load_rows(path: str | Path, file_format: FileFormat = "auto") -> list[Row]:
    """All rows of a file, in order.

    Args:
        path: a .jsonl or .parquet file, or a folder written by `datasets.Dataset.save_to_disk`.
        file_format: "auto" goes by the name.

    Raises:
        DapoError: missing, empty, not of that format, or a line that is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise DapoError(f"data file {path} does not exist")
    if file_format == "auto":
        file_format = _format_of(path)
    read = {"jsonl": _read_jsonl, "parquet": _read_parquet, "dataset": _read_dataset}[file_format]
    rows = list(read(path))
    if not rows:
        raise DapoError(f"data file {path} has no rows")
    return rows


def _format_of(path: Path) -> FileFormat:
    if path.is_dir():
        return "dataset"
    formats: dict[str, FileFormat] = {".jsonl": "jsonl", ".parquet": "parquet"}
    if path.suffix not in formats:
        raise DapoError(f"data file {path}: unknown format {path.suffix!r}, expected .jsonl, .parquet or a folder")
    return formats[path.suffix]


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DapoError(f"{path}, line {number + 1}: not valid JSON ({error})") from None
            if not isinstance(fields, dict):
                raise DapoError(f"{path}, line {number + 1}: {type(fields).__name__} where a JSON object is expected")
            yield Row(path, number, fields)


def _read_parquet(path: Path) -> Iterator[Row]:
    # Imported where they are used, here and below: most runs read jsonl, and these imports take seconds.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DapoError(f"data file {path} is not a readable parquet file ({_first_line(error)})") from None
    return (Row(path, number, fields) for number, fields in enumerate(table.to_pylist()))


def _read_dataset(path: Path) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DapoError(f"folder {path} is not a dataset written by save_to_disk ({_first_line(error)})") from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(str(path / split) for split in dataset)
        raise DapoError(f"folder {path} holds several splits: name one of {splits}")
    return (Row(path, number, dict(fields)) for number, fields in enumerate(dataset))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
