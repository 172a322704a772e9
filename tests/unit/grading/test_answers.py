"""Extraction and comparison of the default grader."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.grading.answers import MAX_ANSWER_CHARS, extract_answer, grade, grade_integers

DATA = Path(__file__).parents[3].parent / "shared" / "data"


def read_jsonl(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    with open(DATA / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 34",
        "Answer:34",
        "answer : 34",
        "**Answer:** 34",
        "**Answer**: 34",
        "**Answer: 34**",
        "### Answer: 34.",
        "Answer: $34$",
        "Answer: $34$.",
        "Answer: $$34$$",
        "Answer: \\(34\\)",
        "Answer: \\[34\\]",
        "Answer:\n34",
        "Answer:\n$$\n34\n$$",
        "Answer: \\[\n34\n\\]",
        "Answer: `34`",
        'Answer: "34"',
        "Answer: \\boxed{34}",
        "Answer: $\\boxed{34}$.",
        "Answer: the area is $\\boxed{34}$ square units",
        "Therefore, Answer: 34",
        "the final answer: 34",
        "ANSWER: 34",
        "It is \\boxed{34}. We check our answer: it fits.",
        "Answer: 33\nNo, wait.\nAnswer: 34\n\n",
        "\\boxed{33}\nAnswer: 34",
        "Answer: 34\nThis line says nothing.",
        'Answer: 34\nI put it on its own line after "Answer:".',
        "It is \\boxed{34}.",
        "\\boxed{33}, rather \\boxed{34}",
        "\\boxed{\\boxed{34}}",
        "\\boxed {34} and then \\boxed{cut off",
        "{ \\{ \\boxed{34}",
    ],
)
def test_extracts_34(text):
    assert extract_answer(text) == "34"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("Answer: \\boxed{1} or \\boxed{2}", "2"),
        ("Answer: -7", "-7"),
        ("Answer: 0.5.", "0.5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("no answer at all", None),
        ("Answer:", None),
        ("Answer: **  **", None),
        ("\\boxed{}", None),
        ("\\boxed{34", None),
        ("Answers: 34", None),
        ("", None),
        ("Answer: " + "1" * (MAX_ANSWER_CHARS + 1), None),
    ],
)
def test_extracts(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "answer, truth, verdict",
    [
        ("34", "34", True),
        ("34.0", "34", True),
        ("34.", "34", True),
        ("+34", "34", True),
        ("034", "34", True),
        ("$34$", "34", True),
        ("\\$34", "34", True),
        ("1,234", "1234", True),
        ("1{,}234", "1234", True),
        ("1,234", "1,234", True),
        ("-5", "−5", True),
        ("-0", "0", True),
        ("35", "34", False),
        ("-34", "34", False),
        ("9" * 9000, "34", False),
        ("34.5", "34", None),
        ("12,34", "1234", None),
        ("\\frac{68}{2}", "34", None),
        ("34", "x", None),
        ("٣٤", "34", None),
    ],
)
def test_integers(answer, truth, verdict):
    assert grade_integers(answer, truth) is verdict


@given(st.integers(), st.integers())
def test_integers_in_every_notation(left, right):
    for written in (f"{left}", f"{left:,}", f"${left}$", f"{left}.0", f"{left}.", f" {left:,}.00 "):
        assert grade_integers(written, str(right)) is (left == right)
        assert grade_integers(written, str(left)) is True


@settings(deadline=None)
@given(st.text(alphabet=" \n*$`.:{}\\([])answerboxd3,4−\ud800", max_size=200))
def test_extraction_takes_any_text(text):
    answer = extract_answer(text)
    assert answer is None or answer.strip() == answer != ""


@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "}",
        "answer:",
        "Answer:",
        "answer: \n",
        "\n",
        "\n ",
        "> ",
        "\\boxed{",
        "answer" + " " * 1000,
        "$",
        "*",
        "a",
        "Answer: $",
        "1,",
    ],
)
def test_a_megabyte_is_read_in_linear_time(unit):
    start = time.perf_counter()
    extract_answer(unit * (1_000_000 // len(unit)))
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("\\frac{1}{2}", "0.5", True),
        ("0.5", "\\frac{1}{2}", True),
        ("\\frac{1}{3}", "0.5", False),
        ("\\frac{68}{2}", "34", True),
        ("34 \\text{ cm}", "34", True),
        ("x = 34", "34", True),
        ("34 or 35", "34", False),
        ("34, 35", "34", False),
        ("33}, \\boxed{34", "34", False),
        ("Evelyn", "\\text{Evelyn}", True),
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("[3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
    ],
)
def test_mathematical_equality(answer, truth, right):
    assert grade(f"Some words.\nAnswer: {answer}", truth) is right


def test_a_missing_answer_is_wrong():
    assert grade("I do not know.", "34") is False


def test_reference_solutions_of_math500_are_right():
    rows = read_jsonl("math/math500.jsonl")
    wrong = [row["unique_id"] for row in rows if not grade(row["solution"], row["answer"])]
    assert wrong == []


def test_other_rows_answers_of_math500_are_wrong():
    rows = read_jsonl("math/math500.jsonl")[:100]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        if row["answer"] != other["answer"].removeprefix("x="):
            assert not grade(f"\\boxed{{{other['answer']}}}", row["answer"]), (row["answer"], other["answer"])


def test_gsm8k_answers_take_the_fast_path():
    for row in read_jsonl("gsm8k/test.jsonl"):
        truth = row["answer"].rpartition("#### ")[2]
        assert grade_integers(f"{truth}.0", truth) is True
        assert grade_integers(str(int(truth.replace(",", "")) + 1), truth) is False
