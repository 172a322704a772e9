"""Truncated importance sampling and the distance between trainer and engine."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithm.importance import k3, mismatch, truncated_importance


def test_factor_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    rollout = torch.tensor([-1.0, -1.0 - math.log(1.5), -1.0 - math.log(5), -1.0 + math.log(2)])
    factor = truncated_importance(old, rollout, cap=2.0)
    torch.testing.assert_close(factor, torch.tensor([1.0, 1.5, 2.0, 0.5]))
    assert not factor.requires_grad


def test_factor_of_an_extreme_difference_is_the_cap():
    assert truncated_importance(torch.tensor([0.0]), torch.tensor([-1e4]), cap=2.0).item() == 2.0


def test_mismatch_by_hand():
    old = torch.tensor([0.0, -1.0, -2.0], requires_grad=True)
    rollout = torch.tensor([0.0, -1.0 - math.log(4), -2.0 + math.log(2)])
    found = mismatch(old, rollout, cap=2.0)
    assert found.absolute.tolist() == pytest.approx([0, math.log(4), math.log(2)], rel=1e-6)
    assert found.k3.tolist() == pytest.approx([0, 4 - 1 - math.log(4), 0.5 - 1 + math.log(2)], rel=1e-6)
    assert found.truncated.tolist() == [0, 1, 0]
    assert not any(t.requires_grad for t in found)


@given(st.floats(-8, 8))
def test_k3_is_not_negative(log_ratio):
    assert k3(torch.tensor(log_ratio, dtype=torch.float64)) >= -1e-15


def test_k3_of_a_small_difference_is_half_its_square():
    assert k3(torch.tensor(1e-3)).item() == pytest.approx(0.5e-6, rel=1e-3)


def test_k3_estimates_the_divergence():
    p, q = (torch.tensor(logits, dtype=torch.float64).log_softmax(0) for logits in ([0.3, -1.0, 0.5], [0.0, 0.4, -0.2]))
    expected = (q.exp() * (q - p)).sum()
    torch.testing.assert_close((q.exp() * k3(p - q)).sum(), expected)
