"""The addition questions: right, mixed, apart, and the same again."""

import json

import pytest
from tools.make_addition import make

from dapo_megatron.errors import DapoError


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    make(tmp_path, train=300, held_out=60)
    return read(tmp_path / "train.jsonl"), read(tmp_path / "eval.jsonl")


def numbers(row):
    a, plus, b, equals = row["prompt"].split()
    assert (plus, equals) == ("+", "=")
    return int(a), int(b)


def test_counts_and_answers(files):
    train, held_out = files
    assert (len(train), len(held_out)) == (300, 60)
    for row in train + held_out:
        assert sum(numbers(row)) == int(row["answer"])


def test_half_of_each_file_has_one_digit(files):
    for rows in files:
        digits = [{len(str(n)) for n in numbers(row)} for row in rows]
        assert digits.count({1}) == digits.count({2}) == len(rows) // 2


def test_no_question_is_in_both_files(files):
    train, held_out = ({row["prompt"] for row in rows} for rows in files)
    assert not train & held_out


def test_two_digit_questions_are_not_repeated(files):
    two_digit = [row["prompt"] for row in files[0] if numbers(row)[0] > 9]
    assert len(two_digit) == len(set(two_digit))


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, train=50, held_out=20, seed=seed)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("train, held_out", [(0, 10), (10, 0), (16_100, 200)])
def test_impossible_counts(tmp_path, train, held_out):
    with pytest.raises(DapoError, match="cannot make"):
        make(tmp_path, train, held_out)
    assert not list(tmp_path.iterdir())


def test_the_largest_counts_are_possible(tmp_path):
    make(tmp_path, train=16_000, held_out=200)
    assert len(read(tmp_path / "train.jsonl")) == 16_000
