"""Reading data files: every mistake is one line that names file and place."""

import codecs
import gzip
import json

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.data.rows import load_rows
from dapo_megatron.errors import DapoError, DataError

RECORDS = [
    {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "level": 1},
    {"prompt": [{"role": "user", "content": "1+2?"}], "reward_model": {"ground_truth": "3"}, "level": 2},
]


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(kind, folder, records=RECORDS, name="data"):
    """A file or folder of that kind with the records."""
    path = folder / f"{name}.{kind}"
    texts = {"jsonl": json_lines(records), "json": json.dumps(records, indent=1).encode()}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif kind == "dataset":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(texts[kind.removesuffix(".gz")]))
    else:
        path.write_bytes(texts[kind])
    return path


KINDS = {"jsonl": "line", "jsonl.gz": "line", "json": "row", "json.gz": "row", "parquet": "row", "dataset": "row"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(kind, tmp_path):
    rows = load_rows(write(kind, tmp_path))
    assert [row.fields for row in rows] == RECORDS
    assert [row.number for row in rows] == [0, 1]
    assert [row.id for row in rows] == [f"data.{kind}:0", f"data.{kind}:1"]
    assert rows[1].place == f"{tmp_path / f'data.{kind}'}, {KINDS[kind]} 2"
    assert [row.value("prompt.0.content") for row in rows] == ["1+1?", "1+2?"]
    assert [row.value("reward_model.ground_truth") for row in rows] == ["2", "3"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz"])
def test_a_byte_order_mark_is_not_part_of_the_text(kind, tmp_path):
    path = write(kind, tmp_path)
    if kind.endswith(".gz"):
        path.write_bytes(gzip.compress(codecs.BOM_UTF8 + gzip.decompress(path.read_bytes())))
    else:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert [row.fields for row in load_rows(path)] == RECORDS


def test_json_with_its_list_under_data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"version": 1.1, "data": RECORDS}))
    assert [row.fields for row in load_rows(path)] == RECORDS


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": 1}', "expected a list of objects or .*, found dict"),
        ('{"data": {"a": 1}}', "expected a list of objects or .*, found dict"),
        ("5", "expected a list of objects or .*, found int"),
        ('[{"a": 1}, 2]', "row 2: int where a JSON object is expected"),
        ('{"a": 1}\n{"a": 2}\n', "not valid JSON .*with one object a line, its name must end in .jsonl"),
        ('[{"a": ' + "[" * 5000 + "]" * 5000 + "}]", "data.json: not valid JSON"),
        ("[{]", "not valid JSON"),
        ("[]", "has no rows"),
    ],
)
def test_bad_json(content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"x" + b, lambda b: b[:12] + b"\xff" * 9 + b[21:]])
@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz"])
def test_a_damaged_gzip_file(kind, damage, tmp_path):
    path = write(kind, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path} is not a readable gzip file"):
        load_rows(path)


def test_several_files_in_the_order_given(tmp_path):
    for folder in ("a", "b", "c/b"):
        (tmp_path / folder).mkdir(parents=True)
    first = write("jsonl", tmp_path / "b", [{"n": 0}, {"n": 1}])
    second = write("jsonl", tmp_path / "a", [{"n": 2}])
    third = write("parquet", tmp_path / "a", [{"n": 3}])
    fourth = write("jsonl", tmp_path / "c/b", [{"n": 4}])
    rows = load_rows([str(first), second, third, fourth])
    assert [row.fields["n"] for row in rows] == [0, 1, 2, 3, 4]
    here = tmp_path.name
    assert [row.id for row in rows] == [
        f"{here}/b/data.jsonl:0",
        f"{here}/b/data.jsonl:1",
        "a/data.jsonl:0",
        "data.parquet:0",
        "c/b/data.jsonl:0",
    ]
    assert [row.fields["n"] for row in load_rows([first, second, third], limit=3)] == [0, 1, 2]
    assert [row.fields["n"] for row in load_rows([first, second, third], limit=1)] == [0]


def test_a_file_named_twice(tmp_path):
    path = write("jsonl", tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in (path, tmp_path / "link.jsonl", f"{tmp_path}/../{tmp_path.name}/data.jsonl"):
        with pytest.raises(DataError, match="is named twice"):
            load_rows([path, other])


def test_each_path_must_have_rows(tmp_path):
    full, empty = write("jsonl", tmp_path), tmp_path / "empty.jsonl"
    empty.touch()
    for paths in ([full, empty], [empty, full]):
        with pytest.raises(DataError, match=f"{empty} has no rows"):
            load_rows(paths)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_a_folder_of_shards_is_read_in_the_order_of_names(kind, tmp_path):
    for number in (2, 0, 1):
        write(kind, tmp_path, [{"n": 2 * number}, {"n": 2 * number + 1}], f"train-0000{number}-of-00003")
    for name in ("README.md", "dataset_info.json", "_metadata.parquet", ".train-00009-of-00003.jsonl"):
        (tmp_path / name).write_text("not rows")
    rows = load_rows(tmp_path)
    assert [row.fields["n"] for row in rows] == list(range(6))
    assert rows[3].id == f"train-00001-of-00003.{kind}:1" and len({row.id for row in rows}) == 6


def test_an_empty_shard_is_no_error(tmp_path):
    write("jsonl", tmp_path, [], "part-0")
    write("jsonl", tmp_path, [{"n": 0}], "part-1")
    assert [row.id for row in load_rows(tmp_path)] == ["part-1.jsonl:0"]


@pytest.mark.parametrize("names", [("train-0", "test-0"), ("train", "test"), ("train-0.parquet", "train-0.jsonl")])
def test_a_folder_with_several_splits_or_formats_is_refused(names, tmp_path):
    for name in names:
        stem, _, kind = name.partition(".")
        write(kind or "parquet", tmp_path, name=stem)
    with pytest.raises(DataError, match="names differ in numbers only, found .*; name the files") as caught:
        load_rows(tmp_path)
    assert "\n" not in str(caught.value)


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
        (b'{"a": 1}\n{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "line 2: not valid JSON"),
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
        ("data.csv", "unknown format '.csv', expected .jsonl, .*.parquet or a folder"),
        ("data.parquet", "is not a readable parquet file"),
        ("folder", "is not a dataset written by save_to_disk"),
        ("splits", "holds several splits: name one of .*splits/train"),
    ]:
        with pytest.raises(DapoError, match=message) as caught:
            load_rows(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("single", [pyarrow.float32(), pyarrow.float16()])
def test_small_floats_are_written_as_short_as_they_were(single, tmp_path):
    kinds = {
        "plain": single,
        "list": pyarrow.list_(single),
        "large": pyarrow.large_list(single),
        "fixed": pyarrow.list_(single, 2),
        "map": pyarrow.map_(pyarrow.string(), single),
        "struct": pyarrow.struct({"deep": pyarrow.large_list(pyarrow.list_(single, 1)), "text": pyarrow.string()}),
        "double": pyarrow.float64(),
    }
    tenth = numpy.float16(0.1) if single == pyarrow.float16() else 0.1
    struct = {"deep": [[tenth]], "text": "t"}
    made = [tenth, [tenth, None], [tenth], [tenth, tenth], [("a", tenth)], struct, 0.10000000149011612]
    columns = [pyarrow.array([value, None], kind) for value, kind in zip(made, kinds.values(), strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=list(kinds)), tmp_path / "data.parquet")
    full, empty = (row.fields for row in load_rows(tmp_path / "data.parquet"))
    short = [0.1, [0.1, None], [0.1], [0.1, 0.1], [("a", 0.1)], {"deep": [[0.1]], "text": "t"}, 0.10000000149011612]
    assert list(full.values()) == short
    assert set(empty.values()) == {None}
