"""`dapo-megatron rollout`, every part real: what it prints and writes is what the engines and the grader said."""

import json
import re
import subprocess
import sys

import psutil
import pytest

from dapo_megatron.engines.control import EngineControl
from tests.engine.conftest import serve
from tests.launch.conftest import finish, recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def long_enough(text, truth):
    """An untrained model is never right: half of its answers shall be."""
    return len(text) > 8


def start(recipe, *arguments):
    command = [sys.executable, "-m", "dapo_megatron.cli", "rollout", str(recipe), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def row(output, name):
    """What the table says of something."""
    (found,) = re.findall(rf"^. {re.escape(name)} +. (.*?) *.$", output, re.MULTILINE)
    return found


def test_responses_are_graded_written_and_told(tmp_path):
    path, responses = recipe(tmp_path / "job", rollout={"group_size": 3}), tmp_path / "responses.jsonl"
    grader = f"grading.grader={__name__}:long_enough"
    process = start(path, grader, "engine.replicas=2", "--prompts", "10", "--output", str(responses))
    code, output, _ = finish(process)
    assert code == 0, output
    groups = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(groups) == len({g["prompt_id"] for g in groups}) == 10
    answers = [r for g in groups for r in g["responses"]]
    assert len(answers) == 30 and len({r["text"] for r in answers}) > 10
    assert all((r["verdict"] == "right") == (len(r["text"]) > 8) for r in answers)
    right = sum(r["verdict"] == "right" for r in answers)
    tokens, truncated = [r["tokens"] for r in answers], [r for r in answers if r["finish_reason"] == "length"]
    mixed = sum(g["outcome"] == "mixed" for g in groups)
    assert row(output, "prompts") == "10, 3 responses each"
    assert row(output, "accuracy") == f"{right / 30:.1%} of responses"
    assert row(output, "mixed groups (what DAPO trains)") == f"{mixed / 10:.1%} ({mixed})"
    assert row(output, "response length, mean") == f"{sum(tokens) / 30:.0f} tokens"
    assert row(output, "truncated").startswith(f"{len(truncated) / 30:.1%} of responses")
    assert row(output, "generated").startswith(f"{sum(tokens)} tokens in ")
    assert not (tmp_path / "job" / "run").exists()  # a training may begin there

    code, output, _ = finish(start(path, "--prompts", "1", "--output", str(responses)))
    assert code == 1 and "is there already" in output


def test_an_engine_that_serves_already_is_asked_unless_a_run_uses_it(tmp_path):
    path, responses = recipe(tmp_path / "job"), tmp_path / "responses.jsonl"
    with serve(tmp_path / "job" / "model", tmp_path / "logs", context_length=64) as (url, _):
        arguments = ("--engine", url, "--prompts", "3", "--output", str(responses))
        code, output, _ = finish(start(path, *arguments))
        assert code == 0 and row(output, "prompts") == "3, 4 responses each", output
        assert len(responses.read_text().splitlines()) == 3
        control = EngineControl(url, 30)
        assert control.is_up() and control.version() == "0"
        control.set_version(7)
        control.close()
        responses.unlink()
        code, output, _ = finish(start(path, *arguments))
        assert code == 1 and f"error: --engine {url} serves version 7 of a run's policy" in output


def test_engines_that_do_not_come_up_are_told_and_nothing_is_left(tmp_path):
    process = start(recipe(tmp_path / "job"), "engine.extra_args=[--no-such-option]")
    everything = psutil.Process(process.pid)
    code, output, _ = finish(process)
    assert code == 1 and "error: every engine has ended, engine-0 with exit code" in output, output
    assert "--no-such-option" in output
    assert not everything.is_running()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
