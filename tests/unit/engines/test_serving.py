"""Which engine is asked: none that is gone, none that serves what nobody pushed, and another when one is replaced."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.engine_set import EngineSet, Member, of_urls, read_engine_set, write_engine_set
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.run_folder import RunFolder

PARAMS = SamplingParams(max_new_tokens=4)


class Engine:
    """Answers with its own token."""

    def __init__(self, token, version="3"):
        self.token, self.version, self.asked, self.hangs = token, version, 0, False

    async def model_info(self, _):
        return web.json_response({"weight_version": self.version})

    async def generate(self, _):
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(30)
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-0.5, self.token, None]],
            "weight_version": self.version,
        }
        return web.json_response({"meta_info": meta})


@asynccontextmanager
async def served(engine):
    app = web.Application()
    app.router.add_get("/model_info", engine.model_info)
    app.router.add_post("/generate", engine.generate)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def tokens(client, count):
    found = await asyncio.gather(*(client.generate([1, 2], PARAMS) for _ in range(count)))
    return [completion.token_ids[0] for (completion,) in found]


def test_a_dead_engine_costs_no_request():
    async def run():
        async with served(Engine(7)) as url:
            dead = "http://127.0.0.1:9"
            async with EngineClient(lambda: of_urls([dead, url]), concurrency=16, timeout_s=20) as client:
                assert await tokens(client, 32) == [7] * 32

    asyncio.run(run())


def test_one_that_dies_is_put_aside_and_comes_back():
    async def run():
        one, two = Engine(1), Engine(2)
        async with served(two) as kept:
            dying = TestServer(web.Application())
            dying.app.router.add_get("/model_info", one.model_info)
            dying.app.router.add_post("/generate", one.generate)
            await dying.start_server()
            url = str(dying.make_url("")).rstrip("/")
            async with EngineClient(lambda: of_urls([url, kept]), concurrency=4, timeout_s=20) as client:
                assert set(await tokens(client, 24)) == {1, 2}
                await dying.close()
                assert await tokens(client, 24) == [2] * 24

    asyncio.run(run())


def test_one_that_serves_what_nobody_pushed_is_not_asked():
    async def run():
        new = Engine(1, version="default")
        async with served(new) as url:
            async with EngineClient(lambda: of_urls([url]), concurrency=4, timeout_s=20) as client:
                waiting = asyncio.create_task(tokens(client, 3))
                await asyncio.sleep(1.0)
                assert new.asked == 0 and not waiting.done()
                new.version = "4"
                assert await waiting == [1, 1, 1]
            async with EngineClient(lambda: of_urls([url]), concurrency=4, timeout_s=0.5) as client:
                new.version = "default"
                with pytest.raises(EngineError, match=r"no response .* it serves version default"):
                    await tokens(client, 1)

    asyncio.run(run())


def test_what_a_replaced_engine_owed_is_asked_of_another():
    async def run():
        hanging, other = Engine(1), Engine(2)
        hanging.hangs = True
        async with served(hanging) as a, served(other) as b:
            now = [EngineSet(1, (Member("engine-0", a),))]
            async with EngineClient(lambda: now[0], concurrency=4, timeout_s=25) as client:
                waiting = asyncio.create_task(tokens(client, 3))
                await asyncio.sleep(1.0)
                assert hanging.asked == 3
                now[0] = EngineSet(2, (Member("engine-0", b, start=2),))
                assert await asyncio.wait_for(waiting, 10) == [2, 2, 2]
                assert client._serving._servers[0].in_flight == 0

    asyncio.run(run())


def test_the_set_is_written_and_read_and_missing_is_told(tmp_path):
    folder, engines = (
        RunFolder(tmp_path),
        EngineSet(5, (Member("engine-0", "http://a:1", 3), Member("engine-1", "http://b:2"))),
    )
    with pytest.raises(ConfigError, match=r"engines\.json cannot be read"):
        read_engine_set(folder)
    write_engine_set(folder, engines)
    assert read_engine_set(folder) == engines

    async def run():
        folder.engine_set.write_text("{")
        async with EngineClient(lambda: read_engine_set(folder), concurrency=4, timeout_s=5) as client:
            await client.generate([1], PARAMS)

    with pytest.raises(ConfigError, match=r"engines\.json cannot be read"):
        asyncio.run(run())
