"""An engine that dies, fails, is replaced or silent: what it was asked for is asked of another."""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_megatron.engines import serving
from dapo_megatron.engines.client import EngineClient, Unanswered
from dapo_megatron.engines.engine_set import EngineSet, Member, of_urls
from tests.unit.engines.fake_engine import PARAMS, Engine, served, tokens


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


def test_one_that_answers_what_is_no_http_is_put_aside():
    """Another program may listen at the port of an engine that has died."""

    async def other_program(reader, writer):
        asked = await reader.readuntil(b"\r\n\r\n")
        body = b'{"weight_version": "3"}'
        if asked.startswith(b"POST"):
            writer.write(b"SSH-2.0-OpenSSH\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 23\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async def run():
        other = await asyncio.start_server(other_program, "127.0.0.1", 0)
        async with served(Engine(7)) as url:
            urls = [f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}", url]
            async with EngineClient(lambda: of_urls(urls), concurrency=16, timeout_s=20) as client:
                assert await tokens(client, 32) == [7] * 32
                assert client.asked_again > 0
        other.close()

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
                assert client._serving._servers[0].tokens_in_flight == 0

    asyncio.run(run())


def test_one_that_fails_is_asked_less_and_less_and_serves_again_when_it_is_well():
    async def run():
        failing, other = Engine(1), Engine(2)
        failing.status = 500
        async with served(failing) as a, served(other) as b:
            async with EngineClient(lambda: of_urls([a, b]), concurrency=2, timeout_s=25) as client:
                for _ in range(16):
                    assert await tokens(client, 2) == [2, 2]
                    await asyncio.sleep(0.1)
                # It rests for 1 s, then for 2 s; without rest it would be asked at least once each time.
                assert 1 <= failing.asked <= 7
                failing.status = 200
                found = set()
                while 1 not in found:
                    found |= set(await tokens(client, 2))
                    await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_request_that_every_engine_fails_at_does_not_keep_them_from_the_others():
    async def run():
        one, two = Engine(1), Engine(2)
        async with served(one) as a, served(two) as b:
            async with EngineClient(lambda: of_urls([a, b]), concurrency=8, timeout_s=20) as client:
                bad = asyncio.create_task(client.generate([13], PARAMS))
                while client.asked_again < 2 or not all(s.serves for s in client._serving._servers):
                    await asyncio.sleep(0.01)
                # It has put engines aside twice, and does so no more, though they go on failing at it.
                seen = client.asked_again
                while client.asked_again < seen + 2:
                    assert all(s.serves for s in client._serving._servers)
                    await asyncio.sleep(0.01)
                assert set(await tokens(client, 4)) == {1, 2}
                with pytest.raises(Unanswered, match="HTTP 500 out of order"):
                    await bad
                assert not any(s.tokens_in_flight for s in client._serving._servers)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_silent_engine_loses_its_requests_to_another_though_nobody_replaces_it(monkeypatch):
    monkeypatch.setattr(serving, "PROBE_TIMEOUT", aiohttp.ClientTimeout(total=0.3))

    async def run():
        stopped, other = Engine(1), Engine(2)
        async with served(stopped) as a, served(other) as b:
            now = [of_urls([a])]
            async with EngineClient(lambda: now[0], concurrency=4, timeout_s=50, silence_s=1.0) as client:
                stopped.hangs = True
                waiting = asyncio.create_task(tokens(client, 3))
                while stopped.asked < 3:
                    await asyncio.sleep(0.05)
                now[0] = EngineSet(2, (*now[0].members, Member("engine-1", b)))
                await asyncio.sleep(3.0)
                assert not waiting.done()  # slow, but alive: nothing is taken from it
                stopped.is_stopped = True
                assert await asyncio.wait_for(waiting, 15) == [2, 2, 2]
                assert await tokens(client, 4) == [2] * 4
                stopped.is_stopped = stopped.hangs = False
                found = set()
                while 1 not in found:
                    found |= set(await tokens(client, 4))
                    await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(run(), 60))
