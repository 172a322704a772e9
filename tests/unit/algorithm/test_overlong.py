"""Soft overlong punishment against equation 13 of the paper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithm.overlong import overlong_penalty

limits = st.integers(1, 40_000).flatmap(lambda top: st.tuples(st.just(top), st.integers(1, top)))


@pytest.mark.parametrize(
    "response_tokens, penalty",
    [
        (0, 0.0),
        (16_384, 0.0),  # L_max - L_cache of the paper's run
        (16_385, -1 / 4096),
        (17_408, -0.25),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1.0),
        (20_481, -1.0),
        (1_000_000, -1.0),
    ],
)
def test_the_papers_limits(response_tokens, penalty):
    assert overlong_penalty(response_tokens, max_tokens=20_480, cache_tokens=4_096) == penalty


@given(limits)
def test_zero_at_the_soft_limit_and_full_from_the_maximum_on(limit):
    max_tokens, cache = limit
    assert overlong_penalty(max_tokens - cache, max_tokens, cache) == 0.0
    assert overlong_penalty(max_tokens, max_tokens, cache) == -1.0
    assert overlong_penalty(max_tokens + 1, max_tokens, cache) == -1.0
    assert overlong_penalty(10 * max_tokens, max_tokens, cache) == -1.0


@given(limits, st.integers(0, 60_000))
def test_monotone_and_continuous(limit, tokens):
    max_tokens, cache = limit
    here, next_ = overlong_penalty(tokens, max_tokens, cache), overlong_penalty(tokens + 1, max_tokens, cache)
    assert -1.0 <= next_ <= here <= 0.0
    assert here - next_ <= 1 / cache + 1e-12, "one token costs at most the slope"


def test_without_cache_there_is_no_slope():
    assert overlong_penalty(100, max_tokens=100, cache_tokens=0) == 0.0
    assert overlong_penalty(101, max_tokens=100, cache_tokens=0) == -1.0


@pytest.mark.parametrize("cache", [-1, 101])
def test_impossible_limits(cache):
    with pytest.raises(ValueError, match="cache_tokens"):
        overlong_penalty(1, max_tokens=100, cache_tokens=cache)
