"""With a lag, evaluations go on beside training: none is lost, each is told of the step whose weights it measured."""

import json
import os

import msgspec
import pytest

from dapo_megatron.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from dapo_megatron.checkpoint.store import published
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import finish, recipe, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def even(text, truth):
    """An untrained model is never right: half of its answers shall be, and no two evaluations alike."""
    return sum(map(ord, text)) % 2 == 0


def evaluations(folder):
    """{step: accuracy} of the records."""
    return {int(r["step"]): r["eval/accuracy"] for r in read_metrics(folder) if "eval/accuracy" in r}


def saved(folder):
    """The same of the checkpoints."""
    manifests = [read_manifest(path) for path in published(folder)]
    return {m.step: m.metrics.get("eval/accuracy") for m in manifests}


def test_every_evaluation_is_recorded_and_saved_under_its_own_step(tmp_path):
    path = recipe(
        tmp_path,
        rollout={"max_policy_lag": 1},
        grading={"grader": f"{__name__}:even"},
        evaluation={"every": 1, "samples": 3},
        checkpoint={"every": 1, "keep_last": 1, "keep_best": 2},
    )
    folder = RunFolder(tmp_path / "run")

    # Any accuracy is enough: known after the first step, and measured again on the weights that the run ends with.
    code, output, _ = finish(start(path, "trainer.steps=9", "trainer.stop_at={eval/accuracy: 0}"))
    assert code == 0, output
    assert list(evaluations(folder)) == [0, 1] and read_metrics(folder)[-1]["step"] == 1

    code, output, _ = finish(start(path, "--resume", "trainer.steps=5"))
    assert code == 0, output
    found, records = evaluations(folder), read_metrics(folder)
    assert list(found) == [int(r["step"]) for r in records] == list(range(6))
    assert len(set(found.values())) > 1
    assert all(0 <= r["eval/other_version_share"] <= 1 and r["eval/seconds"] > 0 for r in records)
    assert records[5]["eval/other_version_share"] == 0  # it was waited for
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and all(steps.count(step) == 2 for step in range(2, 5))  # they came late
    best = sorted(found, key=lambda step: (found[step], step))[-2:]
    kept = saved(folder)
    assert kept == {step: found[step] for step in kept}
    assert {5, *(step for step in best if step)} <= set(kept)

    if os.environ.get("LAYOUTS") == "all":
        an_evaluation_that_was_not_collected_is_made_again(path, folder, lines)


def an_evaluation_that_was_not_collected_is_made_again(path, folder, lines):
    # Killed before it could collect: the checkpoint is there, its evaluation is not.
    last = published(folder)[-1]
    manifest = read_manifest(last)
    (last / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, metrics={})))
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] < 5))
    assert 5 not in evaluations(folder)
    code, output, _ = finish(start(path, "--resume", "trainer.steps=6"))
    assert code == 0, output
    assert list(evaluations(folder)) == list(range(7))
    assert 6 in saved(folder) and None not in saved(folder).values()
