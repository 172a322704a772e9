"""Short responses to one input that are asked for at once are one request, and each of them somebody's own."""

import asyncio

import pytest

from dapo_megatron.engines.coalescing import TOGETHER_TOKENS, CoalescingClient
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.errors import EngineError

SHORT, LONG = SamplingParams(max_new_tokens=TOGETHER_TOKENS), SamplingParams(max_new_tokens=TOGETHER_TOKENS + 1)


class Client:
    """Takes requests until it is let go, then gives each sample its number."""

    share, asked_again = 3, 5

    def __init__(self, error=None):
        self.counts, self.cancelled, self.go, self.error = [], 0, asyncio.Event(), error

    async def generate(self, input_ids, params, count=1):
        first = sum(self.counts)
        self.counts.append(count)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return list(range(first, first + count))


async def asked(client, count, params=SHORT):
    coalescing = CoalescingClient(client)
    tasks = [asyncio.create_task(coalescing.generate([1, 2], params)) for _ in range(count)]
    await asyncio.sleep(0.01)
    return tasks


def test_as_many_travel_together_as_an_engine_may_have_in_flight_and_everybody_gets_another_sample():
    async def run():
        client = Client()
        tasks = await asked(client, 7)
        client.go.set()
        assert await asyncio.gather(*tasks) == list(range(7)) and client.counts == [3, 3, 1]

    asyncio.run(run())


def test_later_ones_are_another_request_and_of_the_first_nothing_is_left():
    async def run():
        client = Client()
        client.go.set()
        coalescing = CoalescingClient(client)
        async with asyncio.timeout(5):
            for samples in ([0, 1], [2, 3]):
                assert await asyncio.gather(*(coalescing.generate([1, 2], SHORT) for _ in range(2))) == samples
        await asyncio.sleep(0)
        assert client.counts == [2, 2] and not coalescing._sends and not coalescing._waiting
        assert coalescing.asked_again == 5

    asyncio.run(run())


def test_of_another_prompt_or_with_other_parameters_is_another_request():
    async def run():
        client = Client()
        coalescing = CoalescingClient(client)
        other = SamplingParams(max_new_tokens=TOGETHER_TOKENS, temperature=0.5)
        asked = [([1, 2], SHORT), ([1, 2], SHORT), ([1, 3], SHORT), ([1, 2], other)]
        tasks = [asyncio.create_task(coalescing.generate(*one)) for one in asked]
        client.go.set()
        await asyncio.gather(*tasks)
        assert client.counts == [2, 1, 1]

    asyncio.run(run())


def test_long_ones_go_alone():
    async def run():
        client = Client()
        tasks = await asked(client, 3, LONG)
        assert client.counts == [1, 1, 1]
        client.go.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2]

    asyncio.run(run())


def test_a_request_ends_when_nobody_waits_for_any_of_its_responses():
    async def run():
        client = Client()
        first, second, third = await asked(client, 3)
        first.cancel(), second.cancel()
        await asyncio.sleep(0.01)
        assert client.cancelled == 0
        client.go.set()
        assert await third == 2
        client = Client()
        for task in (tasks := await asked(client, 3)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert client.cancelled == 1

    asyncio.run(run())


def test_a_request_ends_though_others_that_were_asked_for_with_it_are_waited_for():
    async def run():
        client = Client()
        *three, last = await asked(client, 4)
        last.cancel()
        await asyncio.sleep(0.01)
        assert client.counts == [3, 1] and client.cancelled == 1
        client.go.set()
        assert await asyncio.gather(*three) == [0, 1, 2]

    asyncio.run(run())


@pytest.mark.parametrize(("cancelled", "counts"), [([0], [2]), ([2], [2]), ([0, 1], [1]), ([0, 1, 2], [])])
def test_who_is_cancelled_before_the_request_is_sent_is_not_asked_for(cancelled, counts):
    async def run():
        client = Client()
        client.go.set()
        coalescing = CoalescingClient(client)
        tasks = [asyncio.create_task(coalescing.generate([1, 2], SHORT)) for _ in range(3)]
        for i in cancelled:
            asyncio.get_running_loop().call_soon(tasks[i].cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert client.counts == counts
        assert [i for i, task in enumerate(tasks) if task.cancelled()] == cancelled
        assert [task.result() for task in tasks if not task.cancelled()] == list(range(sum(counts)))

    asyncio.run(run())


@pytest.mark.parametrize("error", [EngineError("no engine answers"), asyncio.CancelledError()])
def test_what_fails_is_heard_by_all(error):
    async def run():
        client = Client(error)
        tasks = await asked(client, 2)
        client.go.set()
        done, _ = await asyncio.wait(tasks, timeout=5)
        assert len(done) == 2
        for task in tasks:
            with pytest.raises(type(error), match=str(error)):
                await task

    asyncio.run(run())
