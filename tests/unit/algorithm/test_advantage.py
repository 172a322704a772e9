"""Group advantages against equation 9 of the paper."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo_megatron.algorithm.advantage import group_advantages

groups = st.lists(st.floats(-2, 1, width=32), min_size=2, max_size=16)


def test_by_hand():
    # rewards 1, -1, -1, -1: mean -1/2, unbiased variance (9/4 + 3/4) / 3 = 1.
    advantages = group_advantages(torch.tensor([1.0, -1.0, -1.0, -1.0]))
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]) / (1 + 1e-6))


def test_two_responses():
    # mean 0, unbiased variance 2; the biased one would give exactly +-1.
    advantages = group_advantages(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(advantages, torch.tensor([2**-0.5, -(2**-0.5)]))


@pytest.mark.parametrize("reward", [1.0, -1.0, 0.1, -1.3])
def test_equal_rewards_teach_nothing(reward):
    advantages = group_advantages(torch.full((16,), reward))
    assert advantages.abs().max() < 1e-6


@given(groups, st.floats(-10, 10), st.floats(0.5, 10))
def test_invariant_to_shift_and_positive_scale(rewards, shift, scale):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    assume(rewards.std() >= 0.1 and scale * rewards.std() >= 0.1)
    expected = group_advantages(rewards)
    torch.testing.assert_close(group_advantages(rewards + shift), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(group_advantages(rewards * scale), expected, rtol=1e-4, atol=1e-9)


@given(groups)
def test_centred_and_ordered_like_the_rewards(rewards):
    rewards = torch.tensor(rewards)
    advantages = group_advantages(rewards)
    assert advantages.dtype == rewards.dtype
    assert abs(advantages.sum().item()) < 1e-4
    order = rewards.argsort(stable=True)
    assert (advantages[order].diff() >= 0).all()


@pytest.mark.parametrize("rewards", [torch.ones(1), torch.ones(0), torch.ones(2, 2)])
def test_not_a_group(rewards):
    with pytest.raises(ValueError, match="at least 2 rewards"):
        group_advantages(rewards)
