"""One data file -> its records: JSON lines, JSON (both also gzipped), parquet, a dataset saved by `datasets`."""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from dapo_megatron.data.numbers import WrittenFloat
from dapo_megatron.errors import DataError

if TYPE_CHECKING:
    import pyarrow

Records = Iterator[tuple[int, dict[str, Any]]]
"""(number from 0, fields); blank lines are counted."""

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # the last: too many brackets in brackets
_HALF_OR_SINGLE = re.compile(r"\b(?:half)?float\b")  # as pyarrow names them, also in a struct<a: list<item: float>>


class Format(NamedTuple):
    """How a kind of file is read."""

    read: Callable[[Path], Records]
    unit: Literal["line", "row"]
    """What its records are counted in."""


def format_of(path: Path) -> Format:
    """By the end of the name; a folder is one that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: another name.
    """
    if path.is_dir():
        return Format(_dataset, "row")
    for suffix, known in FORMATS.items():
        if path.name.endswith(suffix):
            return known
    raise DataError(f"data file {path}: unknown format {path.suffix!r}, expected {', '.join(FORMATS)} or a folder")


def read_records(path: Path) -> Records:
    """The records of one file, in its order.

    Raises:
        DataError: not of the format that its name says, with the line or row.
    """
    try:
        yield from format_of(path).read(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"data file {path} is not a readable gzip file ({error})") from None


def _json_lines(path: Path) -> Records:
    decoder = msgspec.json.Decoder(float_hook=WrittenFloat)
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines):
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                fields = decoder.decode(line)
            except _NOT_JSON as error:
                raise DataError(f"{path}, line {number + 1}: not valid JSON ({error})") from None
            if not isinstance(fields, dict):
                raise DataError(f"{path}, line {number + 1}: {type(fields).__name__} where a JSON object is expected")
            yield number, fields


def _json(path: Path) -> Records:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        content = msgspec.json.Decoder(float_hook=WrittenFloat).decode(text)
    except _NOT_JSON as error:
        hint = "; with one object a line, its name must end in .jsonl" if "trailing" in str(error) else ""
        raise DataError(f"{path}: not valid JSON ({error}){hint}") from None
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DataError(f'{path}: expected a list of objects or {{"data": [...]}}, found {type(content).__name__}')
    for number, fields in enumerate(records):
        if not isinstance(fields, dict):
            raise DataError(f"{path}, row {number + 1}: {type(fields).__name__} where a JSON object is expected")
        yield number, fields


def _parquet(path: Path) -> Records:
    # Imported where they are used, here and below: most runs read JSON, and these imports take seconds.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {path} is not a readable parquet file ({_first_line(error)})") from None
    return enumerate(_rows(table))


def _dataset(path: Path) -> Records:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"folder {path} is not a dataset written by save_to_disk ({_first_line(error)})") from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(str(path / split) for split in dataset)
        raise DataError(f"folder {path} holds several splits: name one of {splits}")
    return enumerate(_rows(dataset.with_format("arrow")[:]))


def _rows(table: "pyarrow.Table") -> list[dict[str, Any]]:
    """float32 and float16 as the doubles that are written alike: 0.1 as float32 is 0.10000000149011612 as a double."""
    rows = table.to_pylist()
    for field in table.schema:
        if _HALF_OR_SINGLE.search(str(field.type)):
            for row in rows:
                row[field.name] = _shortest(row[field.name], field.type)
    return rows


def _shortest(value: Any, kind: "pyarrow.DataType") -> Any:
    """The value with its shortest floats, also within structs, maps and lists of every kind."""
    import numpy
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):
        return float(str(numpy.dtype(kind.to_pandas_dtype()).type(value)))
    if pyarrow.types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if pyarrow.types.is_map(kind):
        return [(_shortest(key, kind.key_type), _shortest(item, kind.item_type)) for key, item in value]
    return [_shortest(item, kind.value_type) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


FORMATS = {
    ".jsonl": Format(_json_lines, "line"),
    ".jsonl.gz": Format(_json_lines, "line"),
    ".json": Format(_json, "row"),
    ".json.gz": Format(_json, "row"),
    ".parquet": Format(_parquet, "row"),
}
