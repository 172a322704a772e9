"""Reading data files: every mistake is one line that names file and place."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.data.rows import load_rows
from dapo_megatron.errors import DapoError

RECORDS = [
    {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "level": 1},
    {"prompt": [{"role": "user", "content": "1+2?"}], "reward_model": {"ground_truth": "3"}, "level": 2},
]


def write(kind, folder):
    if kind == "jsonl":
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif kind == "parquet":
        path = folder / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        path = folder / "data"
        datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_the_three_formats_give_the_same_rows(kind, tmp_path):
    rows = load_rows(write(kind, tmp_path))
    assert [row.fields for row in rows] == RECORDS
    assert [row.number for row in rows] == [0, 1]
    assert [row.value("prompt.0.content") for row in rows] == ["1+1?", "1+2?"]
    assert [row.value("reward_model.ground_truth") for row in rows] == ["2", "3"]


@pytest.mark.parametrize(
    "field, message",
    [
        ("promt", "no field 'promt', did you mean 'prompt'?"),
        ("reward_model.groundtruth", "did you mean 'reward_model.ground_truth'?"),
        ("prompt.1.content", "did you mean 'prompt.0'?"),
        ("prompt.x.content", "did you mean 'prompt.0'?"),
        ("level.x", "'level' has no fields"),
    ],
)
def test_a_missing_field_names_place_and_nearest(field, message, tmp_path):
    row = load_rows(write("jsonl", tmp_path))[1]
    with pytest.raises(DapoError) as caught:
        row.value(field)
    assert message in str(caught.value) and f"{tmp_path / 'data.jsonl'}, line 2" in str(caught.value)


def test_a_field_name_with_dots(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a.b": 1, "a": {"b": 2}}\n')
    assert load_rows(path)[0].value("a.b") == 1


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [row.number for row in load_rows(path)] == [1, 3]
    assert load_rows(path)[1].place == f"{path}, line 4"


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not valid JSON"),
        (b'{"a": 1}\n[1, 2]\n', "line 2: list where a JSON object is expected"),
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
    ],
)
def test_bad_jsonl(content, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DapoError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_and_folders(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "data.parquet").write_text("not parquet")
    (tmp_path / "folder").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(tmp_path / "splits"))
    for name, message in [
        ("absent.jsonl", "does not exist"),
        ("data.csv", "unknown format '.csv', expected .jsonl, .parquet or a folder"),
        ("data.parquet", "is not a readable parquet file"),
        ("folder", "is not a dataset written by save_to_disk"),
        ("splits", "holds several splits: name one of .*splits/train"),
    ]:
        with pytest.raises(DapoError, match=message) as caught:
            load_rows(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
