"""Virtual time by hand, and the real producer in it."""

import asyncio

import pytest

from benchmarks.rollout_schedule import Scene, engines_of, generation_s, simulate
from benchmarks.simulated import SimulatedEngine, run_virtually


async def ends(engine, *tokens, pause=None):
    """Seconds at which each request has its tokens."""
    clock = asyncio.get_running_loop().time

    async def one(n):
        await engine.decode(n)
        return clock()

    async def hold(begin, end):
        await asyncio.sleep(begin)
        engine.pause(True)
        await asyncio.sleep(end - begin)
        engine.pause(False)

    found, *_ = await asyncio.gather(asyncio.gather(*(one(n) for n in tokens)), *([hold(*pause)] if pause else []))
    return found


def test_requests_share_the_pace_and_wait_for_a_slot():
    # Two side by side: 10 / (1 + 2 / 2) = 5 tokens a second each; alone 10 / (1 + 1 / 2).
    engine = SimulatedEngine(slots=2, speed=10.0, half=2.0)
    # The third gets its slot when the first ends at 10 s; the second ends at 20 s, when the third has 50 of 90.
    assert run_virtually(ends(engine, 50, 100, 90)) == pytest.approx([10.0, 20.0, 20.0 + 40 / (10 / 1.5)])
    assert engine.busy_s == pytest.approx(26.0)


def test_a_pause_stops_the_clock_of_the_tokens():
    engine = SimulatedEngine(slots=8, speed=10.0, half=1e9)
    assert run_virtually(ends(engine, 50, 100, pause=(2.0, 5.0))) == pytest.approx([8.0, 13.0])
    assert engine.busy_s == pytest.approx(10.0)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_producer_in_virtual_time(tmp_path, lag):
    scene = Scene(prompts=16, engines=1, steps=25, train_s=0.0, seed=lag)
    scene.train_s = generation_s(scene)
    seen = simulate(scene, lag, tmp_path)
    assert seen.problems == [] and sum(seen.ages.values()) == 16 * 15
    assert max(seen.ages) <= max(1, lag)
    assert seen.idle > 0.3 if lag == 0 else seen.idle < 0.2


def test_every_split_has_an_engine_and_a_trainer():
    assert engines_of(128) == [4, 8, 12, 16, 20, 24, 28] and engines_of(24) == [1, 2, 3, 4, 5]
    assert all(0 < 4 * engines < gpus for gpus in range(8, 200) for engines in engines_of(gpus))
