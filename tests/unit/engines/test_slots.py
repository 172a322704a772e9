"""How many requests are in flight, on which engine, and what the wait for a slot or for room costs."""

import asyncio

import pytest

from dapo_megatron.engines.client import EngineClient, Unanswered
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.engines.wire import SamplingParams
from tests.unit.engines.fake_engine import PARAMS, Engine, served


def test_requests_are_spread_by_the_tokens_in_flight():
    async def run():
        one, two = Engine(1), Engine(2)
        for engine in (one, two):
            engine.length = 10
        async with served(one) as a, served(two) as b:
            async with EngineClient(lambda: of_urls([a, b]), concurrency=32, timeout_s=20) as client:
                await asyncio.gather(*(client.generate([1, 2], PARAMS) for _ in range(4)))
                while not all(s.serves for s in client._serving._servers):
                    await asyncio.sleep(0.05)
                one.until = two.until = asyncio.Event()
                one.asked = two.asked = 0
                # Responses were 10 tokens long, whatever the limit: 100 + 10 are as many as ten times 1 + 10.
                long = SamplingParams(max_new_tokens=10_000)
                waiting = [asyncio.create_task(client.generate([5] * n, long)) for n in [100] + [1] * 10]
                while one.asked + two.asked < 11:
                    await asyncio.sleep(0.02)
                assert sorted([one.asked, two.asked]) == [1, 10]
                one.until.set()
                await asyncio.gather(*waiting)
                assert [s.tokens_in_flight for s in client._serving._servers] == [0, 0]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_an_engine_gets_no_more_than_its_share_while_another_is_away():
    async def run():
        engine = Engine(7)
        engine.until = asyncio.Event()
        async with (
            served(engine) as url,
            EngineClient(lambda: of_urls([url, "http://127.0.0.1:9"]), concurrency=9, timeout_s=20) as client,
        ):
            asked = [asyncio.create_task(client.generate([1, 2], PARAMS)) for _ in range(9)]
            while engine.asked < 5:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert engine.asked == 5
            engine.until.set()
            assert len(await asyncio.gather(*asked)) == 9

    asyncio.run(run())


def test_the_wait_for_room_while_another_is_away_does_not_count():
    """An engine gets its share of two, one request at a time: the other waits for 3 s, then has 5 s for its own 3 s."""

    async def run():
        engine = Engine(7)
        engine.pause_s = 3.0
        async with served(engine) as url:
            dead = "http://127.0.0.1:9"
            async with EngineClient(lambda: of_urls([dead, url]), concurrency=2, timeout_s=5) as client:
                found = await asyncio.gather(*(client.generate([1], PARAMS) for _ in range(2)))
                assert [s.token_ids.tolist() for (s,) in found] == [[7], [7]]
                first, second = sorted(s.waited_s for (s,) in found)
                assert first < 1 and 2.9 < second < 5

    asyncio.run(run())


def test_a_deadline_begins_with_the_slot_and_its_error_is_of_its_own_kind():
    async def run():
        engine = Engine(1)
        async with served(engine) as url:
            async with EngineClient(lambda: of_urls([url]), concurrency=1, timeout_s=2.0) as client:
                engine.until = asyncio.Event()
                first = asyncio.create_task(client.generate([1], PARAMS))
                second = asyncio.create_task(client.generate([1], PARAMS))
                with pytest.raises(Unanswered, match="within 2 s"):
                    await first
                engine.until.set()
                (found,) = await second
                assert 1.9 < found.waited_s < 3  # for its slot

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_cancelled_request_gives_its_slots_back():
    async def run():
        engine = Engine(7)
        engine.until = asyncio.Event()
        async with (
            served(engine) as url,
            EngineClient(lambda: of_urls([url]), concurrency=4, timeout_s=20) as client,
            asyncio.timeout(15),
        ):
            first, waits = (asyncio.create_task(client.generate([1], PARAMS, count)) for count in (3, 2))
            while not engine.asked:
                await asyncio.sleep(0.01)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            engine.until.set()
            assert len(await first) == 3 and len(await client.generate([1], PARAMS, 4)) == 4

    asyncio.run(run())
