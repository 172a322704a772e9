"""Many at once: all results, or the first error with nobody left behind."""

import asyncio

import pytest

from dapo_megatron.rollout.concurrency import all_or_first_error


async def after(seconds, value, log):
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        await asyncio.sleep(0.01)  # it tidies up
        log.append(f"{value} was cancelled")
        raise
    log.append(value)
    if isinstance(value, Exception):
        raise value
    return value


def test_results_are_in_order_and_each_end_is_told():
    log, told = [], []
    calls = [after(0.02, "a", log), after(0.0, "b", log), after(0.01, "c", log)]
    assert asyncio.run(all_or_first_error(calls, told.append)) == ["a", "b", "c"]
    assert log == ["b", "c", "a"] and told == [1, 2, 3]
    assert asyncio.run(all_or_first_error([])) == []


def test_the_first_error_ends_the_others_which_are_waited_for():
    log, error = [], ValueError("the first")
    calls = [after(60, "a", log), after(0.01, error, log), after(60, "b", log), after(0, "c", log)]
    with pytest.raises(ValueError, match="the first"):
        asyncio.run(asyncio.wait_for(all_or_first_error(calls), 10))
    assert log == ["c", error, "a was cancelled", "b was cancelled"]
