"""Clip-Higher: values and gradients against the formula."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo_megatron.algorithm.objective import clip_higher

LOW, HIGH = 0.2, 0.28


def evaluate(ratio, advantage, clip_dual=None):
    """One token of that ratio and advantage: (result, gradient of the loss with respect to its log-prob)."""
    logprobs = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    old_logprobs = torch.tensor([-1.0], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    result = clip_higher(logprobs, old_logprobs, advantages, eps_low=LOW, eps_high=HIGH, clip_dual=clip_dual)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
    return result, gradient.item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.27, 1.0, -1.27, -1.27),  # symmetric 0.2 would clip here
        (1.5, 1.0, -1.28, 0.0),
        (0.5, 1.0, -0.5, -0.5),  # below the range with A > 0: not clipped
        (0.9, -1.0, 0.9, 0.9),
        (0.5, -1.0, 0.8, 0.0),
        (0.75, -1.0, 0.8, 0.0),
        (1.5, -1.0, 1.5, 1.5),  # above the range with A < 0: not clipped
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_by_hand(ratio, advantage, loss, gradient):
    result, actual = evaluate(ratio, advantage)
    assert result.loss.item() == pytest.approx(loss)
    assert actual == pytest.approx(gradient)
    assert result.clipped_high.item() == (advantage > 0 and ratio > 1 + HIGH)
    assert result.clipped_low.item() == (advantage < 0 and ratio < 1 - LOW)
    assert not result.clipped_dual.item()


@given(st.floats(0.01, 20), st.floats(-5, 5))
def test_gradient_is_exactly_zero_where_clipped_and_r_times_A_elsewhere(ratio, advantage):
    assume(
        abs(ratio - (1 + HIGH)) > 1e-9 and abs(ratio - (1 - LOW)) > 1e-9 and (advantage == 0 or abs(advantage) > 1e-6)
    )
    result, gradient = evaluate(ratio, advantage)
    clipped = (advantage > 0 and ratio > 1 + HIGH) or (advantage < 0 and ratio < 1 - LOW)
    assert (result.clipped_high | result.clipped_low).item() == clipped
    if clipped or advantage == 0:
        assert gradient == 0.0
    else:
        assert gradient == pytest.approx(-ratio * advantage)
    expected = -min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    assert result.loss.item() == pytest.approx(expected)
    assert not result.ratio.requires_grad


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, dual",
    [
        (2.9, -1.0, 2.9, 2.9, False),
        (3.5, -1.0, 3.0, 0.0, True),
        (3.5, -2.0, 6.0, 0.0, True),
        (3.5, 1.0, -1.28, 0.0, False),
    ],
)
def test_dual_clip(ratio, advantage, loss, gradient, dual):
    result, actual = evaluate(ratio, advantage, clip_dual=3.0)
    assert result.loss.item() == pytest.approx(loss)
    assert actual == pytest.approx(gradient)
    assert result.clipped_dual.item() is dual


@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_stay_finite(log_ratio, advantage):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    result = clip_higher(logprobs, torch.zeros(1), torch.tensor([advantage]), eps_low=LOW, eps_high=HIGH)
    result.loss.sum().backward()
    assert result.loss.isfinite().all() and logprobs.grad.isfinite().all()


def test_no_gradient_reaches_the_old_policy():
    logprobs = torch.zeros(3, requires_grad=True)
    old = torch.zeros(3, requires_grad=True)
    clip_higher(logprobs, old, torch.ones(3), eps_low=LOW, eps_high=HIGH).loss.sum().backward()
    assert old.grad is None and logprobs.grad is not None


@pytest.mark.parametrize("bad", [{"eps_low": 1.0}, {"eps_low": -0.1}, {"eps_high": -0.1}, {"clip_dual": 1.0}])
def test_impossible_bounds(bad):
    with pytest.raises(ValueError):
        clip_higher(torch.zeros(1), torch.zeros(1), torch.zeros(1), **({"eps_low": LOW, "eps_high": HIGH} | bad))
