"""Truncated importance sampling and the mismatch statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithm.importance import mismatch_statistics, truncated_importance


def test_factor_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    rollout = torch.tensor([-1.0, -1.0 - math.log(1.5), -1.0 - math.log(5), -1.0 + math.log(2)])
    factor = truncated_importance(old, rollout, cap=2.0)
    torch.testing.assert_close(factor, torch.tensor([1.0, 1.5, 2.0, 0.5]))
    assert not factor.requires_grad


def test_factor_of_an_extreme_difference_is_the_cap():
    assert truncated_importance(torch.tensor([0.0]), torch.tensor([-1e4]), cap=2.0).item() == 2.0


def test_statistics_by_hand():
    old = torch.tensor([0.0, -1.0, -2.0, float("nan")])
    rollout = torch.tensor([0.0, -1.0 - math.log(4), -2.0 + math.log(2), 0.0])
    active = torch.tensor([True, True, True, False])
    statistics = {name: value.item() for name, value in mismatch_statistics(old, rollout, active, cap=2.0).items()}
    assert statistics == pytest.approx(
        {
            "tokens": 3,
            "abs_diff_sum": math.log(4) + math.log(2),
            "k1_sum": -math.log(4) + math.log(2),
            "k3_sum": (4 - 1 - math.log(4)) + (0.5 - 1 + math.log(2)),
            "truncated": 1,
            "abs_diff_max": math.log(4),
        },
        rel=1e-6,
    )


@given(st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.booleans()), max_size=20), st.integers(0, 20))
def test_sums_add_up_over_any_split(tokens, cut):
    def statistics(part):
        old, rollout, active = zip(*part, strict=True) if part else ((), (), ())
        return mismatch_statistics(
            torch.tensor(old), torch.tensor(rollout), torch.tensor(active, dtype=torch.bool), cap=2.0
        )

    whole, left, right = statistics(tokens), statistics(tokens[:cut]), statistics(tokens[cut:])
    assert whole["k3_sum"] >= 0
    for name in ("tokens", "abs_diff_sum", "k1_sum", "k3_sum", "truncated"):
        torch.testing.assert_close(left[name] + right[name], whole[name])
    torch.testing.assert_close(torch.maximum(left["abs_diff_max"], right["abs_diff_max"]), whole["abs_diff_max"])
