"""The dry run reads what the controller would read and calls what it would call, and starts nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dapo_megatron.errors import ConfigError, DataError
from dapo_megatron.rollout.dry_run.checks import dry_run
from tests.tiny import byte_tokenizer, run_config

ROOT = Path(__file__).parents[3]


def upper(text, truth):
    """A grader of a user's that truths in lower case do not satisfy."""
    if truth == "raise":
        raise ValueError("two\nlines")
    return text == truth.upper()


async def lone_rollout(prompt):
    """Lacks the engine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checked(tmp_path, model, capsys):
    """Runs it on files with the given answers; returns what it printed."""

    def checked(answers, eval_answers=None, grading=(), rollout=(), **data):
        files = {"train": answers} | ({"eval": eval_answers} if eval_answers else {})
        for name, values in files.items():
            rows = [json.dumps({"prompt": "?" * (5 + i), "answer": value}) + "\n" for i, value in enumerate(values)]
            (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        paths = {name: str(tmp_path / f"{name}.jsonl") for name in files}
        options = {"template": "plain", "chat": False, "max_prompt_tokens": 100} | paths | data
        config = run_config(model, data=options, grading={"workers": 1, **dict(grading)}, rollout=dict(rollout))
        dry_run(config, Console(highlight=False, soft_wrap=True))
        return capsys.readouterr().out

    return checked


def test_each_file_is_a_line_of_prompts_dropped_and_longest(checked):
    out = checked([1, 2, 3, 4], ["1/2", ["3", "4"]], max_prompt_tokens=6)
    assert "data.train: 2 prompts, 2 dropped, longest 8 tokens (data.max_prompt_tokens=6)" in out
    assert "data.eval: 2 prompts, 0 dropped, longest 6 tokens" in out
    assert re.findall("(train|eval): ground truths graded against themselves: (.*)", out) == [
        ("train", "right, right"),
        ("eval", "right, right, right"),
    ]
    assert "data.eval: none" in checked([1])


def test_the_last_row_is_read(checked):
    with pytest.raises(DataError, match="train.jsonl, line 40, field 'answer': the answer is empty"):
        checked(["1"] * 39 + [""])
    with pytest.raises(DataError, match="eval.jsonl, line 3, field 'answer': the answer is empty"):
        checked(["1"], ["1", "1", ""])
    checked(["1"], ["1", "1", ""], eval_limit=2)


@pytest.mark.parametrize("template", ["boxed", "plain"])
@pytest.mark.parametrize("thinking", [None, ["<think>", "</think>"]])
def test_the_built_in_grader_gets_an_answer_in_its_form(checked, template, thinking):
    out = checked([r"\frac{1}{2}"], template=template, grading={"thinking": thinking})
    assert "graded against themselves: right" in out


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_truth_unlike_itself_is_an_error_of_the_data(checked, at):
    answers = ["1"] * 5
    answers[at] = "half of 48 is 24\n#### 24"
    with pytest.raises(DataError, match=f"data.train, prompt train.jsonl:{at}: .*graded wrong .*answer_pattern"):
        checked(answers)


def test_a_users_verdicts_are_told_and_are_no_error(checked):
    out = checked(["A", "raise", "c"], grading={"grader": f"{__name__}:upper"})
    assert "graded against themselves: right, unknown, wrong" in out
    assert "1 raised, the last: ValueError: two" in out


def test_a_grader_without_any_verdict_is_an_error(checked):
    with pytest.raises(ConfigError, match="has no verdict on anything: .* raised, the last: ValueError: two"):
        checked(["raise"] * 3, grading={"grader": f"{__name__}:upper"})


def test_functions_that_cannot_be_called(checked):
    with pytest.raises(ConfigError, match="has no function absent"):
        checked(["1"], grading={"grader": f"{__name__}:absent"})
    with pytest.raises(ConfigError, match=r"cannot be called as lone_rollout\(prompt, engine\)"):
        checked(["1"], rollout={"function": f"{__name__}:lone_rollout"})


def test_its_process_finds_modules_in_the_current_folder_and_tells_errors_in_a_line(tmp_path, model):
    (tmp_path / "mine.py").write_text("def same(text, truth):\n    return text == truth\n")
    (tmp_path / "train.jsonl").write_text('{"prompt": "?", "answer": "x"}\n')
    data = {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 400}
    config = run_config(model, data=data, grading={"grader": "mine:same", "workers": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump()))

    def run(*overrides):
        command = [sys.executable, "-W", "ignore", "-m", "dapo_megatron.rollout.dry_run", "recipe.yaml", *overrides]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "data.train: ground truths graded against themselves: right" in done.stdout
    failed = run("data.answer_field=anser")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert "did you mean 'answer'" in failed.stderr
