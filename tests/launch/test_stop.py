"""A stop that comes while the last step is evaluated costs neither the step nor its evaluation."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.checkpoint.store import published
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.process import read_statuses
from dapo_megatron.rollout import single_turn
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import finish, recipe, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CASES = {"a person's file": (0, 0)}
"""Lag, and the exit code of who is asked in this way."""
if os.environ.get("LAYOUTS") == "all":
    CASES["SIGTERM"] = (1, 130)


async def held(prompt, engine):
    """Answers of version 1 to held-out prompts do not end while the file HOLD is there."""
    response = await single_turn.rollout(prompt, engine)
    while (
        prompt.id.startswith("eval") and response.version_spans[-1].version == 1 and Path(os.environ["HOLD"]).exists()
    ):
        await asyncio.sleep(0.1)
    return response


def evaluated(folder):
    """{step: whether its record has an evaluation}."""
    return {int(record["step"]): "eval/accuracy" in record for record in read_metrics(folder)}


@pytest.mark.parametrize(("lag", "exit_code"), CASES.values(), ids=CASES)
def test_a_stop_is_heard_while_an_evaluation_is_waited_for(tmp_path, monkeypatch, lag, exit_code):
    hold, folder = tmp_path / "hold", RunFolder(tmp_path / "run")
    monkeypatch.setenv("HOLD", str(hold))
    hold.touch()
    path = recipe(
        tmp_path,
        rollout={"function": f"{__name__}:held", "max_policy_lag": lag},
        evaluation={"every": 1000},
        trainer={"steps": 1},
        launch={"stop_grace_s": 60},
    )
    process, began = start(path), time.monotonic()
    while not any((s.phase, s.detail) == ("evaluate", "step 1") for s in read_statuses(folder)):
        assert process.poll() is None and time.monotonic() - began < 200, process.communicate()[0]
        time.sleep(0.1)
    if exit_code:
        process.terminate()
    else:
        folder.stop_request.touch()
    code, output, seconds = finish(process)
    assert code == exit_code and seconds < 40, output
    (checkpoint,) = published(folder)
    saved = read_manifest(checkpoint)
    assert (saved.step, saved.format, saved.metrics) == (1, "fully_reshardable", {})
    assert evaluated(folder) == {0: True, 1: False}

    hold.unlink()
    code, output, _ = finish(start(path, "--resume"))
    assert code == 0, output
    assert evaluated(folder) == {0: True, 1: True}
    assert read_manifest(checkpoint).metrics["eval/accuracy"] == read_metrics(folder)[-1]["eval/accuracy"]
