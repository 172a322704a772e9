"""What becomes of a server's answer to /generate: refused, asked again, or taken."""

import asyncio

import pytest
from aiohttp import web

from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.errors import EngineError
from tests.unit.engines.fake_engine import served


def reply(token, finish="stop"):
    logprobs = [[-0.5, token, None]]
    meta = {"finish_reason": {"type": finish}, "output_token_logprobs": logprobs, "weight_version": "3"}
    return {"meta_info": meta}


class Engine:
    """Gives its answers, (HTTP status, body), one after the other.

    `asked` is how many samples each was for, `keys` what each was cached under.
    """

    def __init__(self, *answers):
        self.answers, self.asked, self.keys = list(answers), [], []

    async def model_info(self, _):
        return web.json_response({"weight_version": "3"})

    async def server_info(self, _):
        return web.json_response({})

    async def generate(self, request):
        body = await request.json()
        ids = body["input_ids"]
        self.keys.append(body.get("extra_key"))
        self.asked.append(len(ids) if isinstance(ids[0], list) else 1)
        status, body = self.answers.pop(0)
        return web.json_response(body, status=status)


def tokens(engine, count=2):
    """The token of each sample that a client gets."""

    async def run():
        async with served(engine) as url, EngineClient(lambda: of_urls([url]), concurrency=4, timeout_s=20) as client:
            samples = await client.generate([7, 8], SamplingParams(max_new_tokens=4), count)
            return [int(sample.token_ids[0]) for sample in samples]

    return asyncio.run(run())


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_a_server_will_never_take_is_refused_at_once(status):
    engine = Engine((status, {"error": "the input is longer than the context"}))
    with pytest.raises(EngineError, match=f"refused /generate of 2 tokens: HTTP {status} .*longer than the context"):
        tokens(engine)
    assert engine.asked == [2]


@pytest.mark.parametrize("status", [408, 429])
def test_what_it_may_take_later_is_asked_for_again(status):
    engine = Engine((status, {}), (200, [reply(1), reply(2)]))
    assert tokens(engine) == [1, 2] and engine.asked == [2, 2]


def test_only_what_was_aborted_is_asked_for_again():
    engine = Engine((200, [reply(1, "abort"), reply(2)]), (200, reply(3)))
    assert tokens(engine) == [2, 3] and engine.asked == [2, 1]


def test_no_more_is_taken_than_was_asked_for():
    assert tokens(Engine((200, [reply(1), reply(2), reply(3)]))) == [1, 2]


@pytest.mark.parametrize("fresh_prefixes", [False, True])
def test_only_requests_in_flight_share_a_prefix_where_pushes_leave_old_ones_behind(fresh_prefixes):
    engine, params = Engine(*[(200, reply(1))] * 3), SamplingParams(max_new_tokens=4)

    async def run():
        async with (
            served(engine) as url,
            EngineClient(lambda: of_urls([url]), concurrency=4, timeout_s=20, fresh_prefixes=fresh_prefixes) as client,
        ):
            await asyncio.gather(*(client.generate([7, 8], params) for _ in range(2)))
            await client.generate([7, 8], params)

    asyncio.run(run())
    first, second, later = engine.keys
    assert (first == second != later) if fresh_prefixes else engine.keys == [None] * 3
