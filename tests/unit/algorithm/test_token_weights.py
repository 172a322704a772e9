"""The three aggregations, each against a loop written from its formula."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithm.objective import token_weights

mini_batches = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=6)


def token_formula(losses):
    """1 / sum_g sum_i |o_gi|  *  sum_g sum_i sum_t loss"""
    every = [loss for group in losses for response in group for loss in response]
    return sum(every) / len(every)


def group_token_formula(losses):
    """mean over prompts of ( 1 / sum_i |o_i|  *  sum_i sum_t loss ), equation 8"""
    means = []
    for group in losses:
        tokens = [loss for response in group for loss in response]
        if tokens:
            means.append(sum(tokens) / len(tokens))
    return sum(means) / len(means)


def sample_formula(losses):
    """mean over responses of ( 1 / |o_i|  *  sum_t loss ), GRPO"""
    means = [sum(response) / len(response) for group in losses for response in group if response]
    return sum(means) / len(means)


FORMULAS = {"token": token_formula, "group_token": group_token_formula, "sample": sample_formula}


@pytest.mark.parametrize("aggregation", FORMULAS)
@given(mini_batches, st.integers(0, 2**32))
def test_weighted_sum_is_the_formula(aggregation, active_tokens, seed):
    draw = random.Random(seed)
    losses = [[[draw.uniform(-1, 1) for _ in range(tokens)] for tokens in group] for group in active_tokens]
    weights = token_weights(active_tokens, aggregation)
    total = sum(
        weight * sum(response)
        for group, group_weights in zip(losses, weights, strict=True)
        for response, weight in zip(group, group_weights, strict=True)
    )
    if any(map(any, active_tokens)):
        assert total == pytest.approx(FORMULAS[aggregation](losses), abs=1e-12)
    else:
        assert weights == [[0.0] * len(group) for group in active_tokens]


@pytest.mark.parametrize(
    "aggregation, weights",
    [
        ("token", [[1 / 10, 1 / 10], [1 / 10, 0.0], [0.0, 0.0]]),
        ("group_token", [[1 / (2 * 6), 1 / (2 * 6)], [1 / (2 * 4), 0.0], [0.0, 0.0]]),
        ("sample", [[1 / (3 * 1), 1 / (3 * 5)], [1 / (3 * 4), 0.0], [0.0, 0.0]]),
    ],
)
def test_by_hand_with_masked_responses_and_a_masked_group(aggregation, weights):
    assert token_weights([[1, 5], [4, 0], [0, 0]], aggregation) == weights


@pytest.mark.parametrize("aggregation", FORMULAS)
def test_nothing_active(aggregation):
    assert token_weights([[0, 0], [0]], aggregation) == [[0.0, 0.0], [0.0]]
    assert token_weights([], aggregation) == []


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="choose token, group_token or sample"):
        token_weights([[1]], "mean")
