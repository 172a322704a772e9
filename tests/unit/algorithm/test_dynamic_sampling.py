"""Dynamic sampling: constraint 0 < number right < G of equation 11."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithm.advantage import group_advantages
from dapo_megatron.algorithm.dynamic_sampling import group_outcome, keep_group
from dapo_megatron.algorithm.overlong import overlong_penalty
from dapo_megatron.algorithm.reward import accuracy_reward


@pytest.mark.parametrize(
    "verdicts, outcome",
    [
        (["right", "right"], "all_right"),
        (["wrong", "wrong"], "all_wrong"),
        (["right", "wrong"], "mixed"),
        (["right", "unknown"], "mixed"),
        (["wrong", "unknown"], "all_wrong"),
        (["unknown", "unknown"], "all_wrong"),
        (["right"], "all_right"),
    ],
)
def test_outcomes(verdicts, outcome):
    assert group_outcome(verdicts) == outcome


@given(st.lists(st.sampled_from(["right", "wrong", "unknown"]), min_size=1, max_size=16))
def test_kept_iff_some_but_not_all_are_right(verdicts):
    assert keep_group(verdicts) == (0 < verdicts.count("right") < len(verdicts))


def test_all_wrong_group_of_unequal_lengths_is_filtered():
    verdicts, lengths = ["wrong"] * 4, [10, 60, 90, 100]
    rewards = [
        accuracy_reward(verdict) + overlong_penalty(length, max_tokens=100, cache_tokens=50)
        for verdict, length in zip(verdicts, lengths, strict=True)
    ]
    assert group_advantages(torch.tensor(rewards)).abs().max() > 1, "the shaped rewards alone would train on it"
    assert not keep_group(verdicts)


def test_empty_group():
    with pytest.raises(ValueError, match="without responses"):
        group_outcome([])
