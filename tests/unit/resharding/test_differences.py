"""When the log-probs of trainer and engine are too far apart."""

import math

import numpy as np
import pytest

from tests.tiny import run_config

from dapo_megatron.engines.wire import Completion
from dapo_megatron.resharding.differences import LIMITS, Differences, differences, summary


def tokens(largest, others=0.01, count=256):
    return np.array([largest] + [others] * (count - 1))


@pytest.mark.parametrize(
    ("dtype", "values", "fails"),
    [
        ("bfloat16", tokens(0.9), False),  # a single token says nothing
        ("bfloat16", np.concatenate([tokens(0.6, others=0.6, count=8), tokens(0.0)]), True),
        ("bfloat16", tokens(0.11, others=0.11), True),
        ("bfloat16", tokens(0.09, others=0.09), False),
        ("bfloat16", tokens(math.nan), True),
        ("float32", tokens(2e-4, others=0.0), True),
        ("float32", tokens(9e-5, others=9e-5), False),
        ("float32", tokens(math.nan), True),
    ],
)
def test_limits_of_each_type(dtype, values, fails):
    assert summary(values).exceeds(LIMITS[dtype], 1.0) == fails


def test_slack_multiplies_every_limit():
    assert not Differences(0.19, 0.99, 9.0).exceeds(LIMITS["bfloat16"], 2.0)
    assert Differences(0.21, 0.99, 9.0).exceeds(LIMITS["bfloat16"], 2.0)
    assert Differences(0.19, 1.01, 9.0).exceeds(LIMITS["bfloat16"], 2.0)
    assert Differences(0.0, 0.0, 2e-4).exceeds(LIMITS["float32"], 1.9)


def test_summary_by_hand():
    found = summary(np.arange(101.0))
    assert (found.mean, found.p99, found.max) == (50.0, 99.0, 100.0)


def test_differences_are_of_the_sampled_tokens():
    sampled = [
        ("a", [5, 6, 7], Completion([1, 2], [-1.0, -2.0], [], "length")),
        ("b", [5], Completion([3], [-4.0], [], "stop")),
    ]
    ours = np.array([[9.0, 9.0, -1.5, -2.0], [-3.0, 9.0, 9.0, 9.0]])
    assert [d.tolist() for d in differences(sampled, ours)] == [[0.5, 0.0], [1.0]]


@pytest.mark.parametrize(
    ("trainer", "engine", "coarser", "count"),
    [
        ("float32", None, "float32", 4),
        ("bfloat16", None, "bfloat16", 32),  # of rollout.max_response_tokens=32
        ("bfloat16", "float32", "bfloat16", 32),
        ("float32", "bfloat16", "bfloat16", 32),
    ],
)
def test_the_coarser_type_decides(tmp_path, trainer, engine, coarser, count):
    config = run_config(tmp_path, model={"path": "m", "dtype": trainer}, engine={"dtype": engine})
    assert (config.coarser_dtype, config.verify_tokens) == (coarser, count)
    assert run_config(tmp_path, resharding={"verify_tokens": 7}).verify_tokens == 7
