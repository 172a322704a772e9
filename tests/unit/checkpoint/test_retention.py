"""Which checkpoints are kept."""

import msgspec
import pytest

from dapo_megatron.checkpoint.manifest import Manifest
from dapo_megatron.checkpoint.retention import kept_steps
from dapo_megatron.config import CheckpointConfig

ACCURACY = {2: 0.1, 4: 0.6, 6: 0.5, 8: 0.6, 10: 0.2}


def manifests(steps=range(1, 13)):
    return [
        Manifest(
            format="dp_reshardable",
            model={},
            dtype="float32",
            step=step,
            metrics={"eval/accuracy": ACCURACY[step], "eval/greedy_accuracy": -ACCURACY[step]}
            if step in ACCURACY
            else {},
        )
        for step in steps
    ]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {11, 12}),
        ({"keep_last": 1}, {12}),
        ({"keep_last": 30}, set(range(1, 13))),
        ({"keep_last": 1, "keep_every": 5}, {5, 10, 12}),
        ({"keep_last": 1, "keep_best": 1}, {8, 12}),
        ({"keep_last": 1, "keep_best": 3}, {4, 6, 8, 12}),
        ({"keep_last": 1, "keep_best": 9}, {2, 4, 6, 8, 10, 12}),
        ({"keep_last": 1, "keep_best": 1, "best_metric": "eval/greedy_accuracy"}, {2, 12}),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 6}, {6, 8, 11, 12}),
    ],
)
def test_the_newest_every_nth_and_the_best_are_kept(options, kept):
    assert kept_steps(manifests(), CheckpointConfig(**options)) == kept


def test_the_newest_that_any_layout_can_resume_is_kept():
    made = [
        msgspec.structs.replace(m, format="fully_reshardable" if m.step in (4, 7) else m.format) for m in manifests()
    ]
    assert kept_steps(made, CheckpointConfig(keep_last=2)) == {7, 11, 12}


def test_nothing_to_keep():
    assert kept_steps([], CheckpointConfig(keep_best=2)) == set()
