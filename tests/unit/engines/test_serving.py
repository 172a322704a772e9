"""Which engine is asked: none that is gone, none that serves what nobody pushed, and another when one is replaced."""

import asyncio
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_megatron.engines import engine_set, serving
from dapo_megatron.engines.client import EngineClient, Unanswered
from dapo_megatron.engines.engine_set import EngineSet, Member, of_urls, read_engine_set, write_engine_set
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.run_folder import RunFolder

PARAMS = SamplingParams(max_new_tokens=4)


class Engine:
    """Answers with its own token."""

    def __init__(self, token, version="3"):
        self.token, self.version, self.asked, self.hangs = token, version, 0, False
        self.status, self.is_stopped, self.length, self.until, self.pause_s = 200, False, 1, None, 0.0

    async def model_info(self, _):
        return web.json_response({"weight_version": self.version})

    async def server_info(self, _):
        if self.is_stopped:
            await asyncio.sleep(30)
        return web.json_response({})

    async def generate(self, request):
        self.asked += 1
        ids = (await request.json())["input_ids"]
        if self.status != 200 or 13 in ids:
            return web.Response(status=max(self.status, 500), text="out of order")
        if self.until is not None:
            await self.until.wait()
        await asyncio.sleep(30 if self.hangs else self.pause_s)
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-0.5, self.token, None]] * self.length,
            "weight_version": self.version,
        }
        reply = {"meta_info": meta}
        return web.json_response([reply] * len(ids) if isinstance(ids[0], list) else reply)


@asynccontextmanager
async def served(engine):
    app = web.Application()
    app.router.add_get("/model_info", engine.model_info)
    app.router.add_get("/server_info", engine.server_info)
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


def test_one_that_answers_is_not_asked_whether_it_lives():
    class Session:
        asked = 0

        def get(self, url, timeout):
            assert url.endswith("/server_info")
            self.asked += 1
            raise TimeoutError

    async def run():
        session, engines = Session(), serving.ServingEngines(lambda: of_urls([]), 9.0, 4)
        server = serving.Server(Member("engine-0", "http://engine-0"))
        found = []
        for owes, answered in [(False, False), (True, True), (True, False), (True, True), (False, True), (True, False)]:
            server.attempts = {asyncio.current_task()} if owes else set()
            if answered:
                engines.answered(server, [1])
            await engines._watch(server, session)
            found.append((session.asked, server.silent_since is not None))
        assert found == [(0, False), (0, False), (1, True), (1, False), (1, False), (2, True)]

    asyncio.run(run())


def test_of_a_new_set_those_that_stay_go_on_with_what_they_owe_and_who_is_gone_loses_it():
    async def run():
        now = [of_urls(["http://a", "http://b"])]
        engines = serving.ServingEngines(lambda: now[0], 9.0, 4)
        engines._look()
        stays, goes = engines._servers
        owed = [asyncio.create_task(asyncio.sleep(60)) for _ in range(2)]
        for server, task in zip((stays, goes), owed, strict=True):
            server.serves, server.responses, server.attempts = True, 2, {task}
        now[0] = EngineSet(2, (now[0].members[0], Member("engine-1", "http://b", start=2)))
        engines._look()
        await asyncio.sleep(0)
        kept, new = engines._servers
        assert kept is stays and (kept.serves, kept.responses) == (True, 2) and new is not goes and not new.serves
        assert [task.cancelled() for task in owed] == [False, True]
        owed[0].cancel()

    asyncio.run(run())


def test_it_rests_twice_as_long_each_time_it_fails_until_it_answers():
    """However many of its requests tell of one failure."""

    async def run():
        engines, server = serving.ServingEngines(lambda: of_urls([]), 9.0, 4), serving.Server(Member("engine-0", ""))

        def rests_s():
            server.serves = True
            for _ in range(3):
                engines.failed(server, "HTTP 500")
            assert not server.serves
            return round(server.rests_until - asyncio.get_running_loop().time(), 1)

        assert [rests_s() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
        engines.answered(server, [1])
        assert rests_s() == 1

    asyncio.run(run())


def test_one_that_rests_is_not_probed(monkeypatch):
    async def run():
        engines, probed = serving.ServingEngines(lambda: of_urls(["http://a", "http://b"]), 9.0, 4), []
        engines._look()
        rests, other = engines._servers
        rests.rests_until = asyncio.get_running_loop().time() + 60

        async def probe(server, session):
            probed.append(server)

        monkeypatch.setattr(engines, "_probe", probe)
        engines.start(None)
        await asyncio.sleep(0.05)
        await engines.stop()
        assert probed == [other]

    asyncio.run(run())


class Answers:
    """A session in which an engine gives these HTTP statuses."""

    def __init__(self, model_info, server_info, version="3"):
        self.statuses, self.version = {"/model_info": model_info, "/server_info": server_info}, version

    @asynccontextmanager
    async def get(self, url, timeout):
        self.status = self.statuses[url]
        yield self

    async def read(self):
        return b"{}"

    async def json(self):
        return {"weight_version": self.version}


@pytest.mark.parametrize(
    ("answers", "serves", "why_not"),
    [
        (Answers(200, 200), True, None),
        (Answers(200, 404), True, None),  # it has no such page, and answers
        (Answers(200, 500), False, "/server_info: HTTP 500"),
        (Answers(503, 200), False, "HTTP 503"),
        (Answers(200, 200, "default"), False, "it serves version default, which nobody pushed"),
    ],
)
def test_one_that_does_not_serve_is_probed_and_loses_its_requests_when_it_is_silent_for_long(answers, serves, why_not):
    async def run():
        engines, server = serving.ServingEngines(lambda: of_urls([]), 9.0, 4), serving.Server(Member("engine-0", ""))
        owed = asyncio.create_task(asyncio.sleep(60))
        server.attempts, server.silent_since = {owed}, asyncio.get_running_loop().time() - 10
        await engines._probe(server, answers)
        await asyncio.sleep(0)
        assert server.serves == serves
        is_silent = why_not is not None and "HTTP" in why_not
        if why_not is not None:
            assert server.why_not == (f"no sign of life for 10 s ({why_not})" if is_silent else why_not)
        assert owed.cancelled() == is_silent
        owed.cancel()

    asyncio.run(run())


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


def test_the_set_is_written_and_read_and_missing_is_told(tmp_path, monkeypatch):
    folder, engines = (
        RunFolder(tmp_path),
        EngineSet(5, (Member("engine-0", "http://a:1", 3), Member("engine-1", "http://b:2"))),
    )
    with pytest.raises(ConfigError, match=r"engines\.json cannot be read"):
        read_engine_set(folder)
    write_engine_set(folder, engines)
    assert read_engine_set(folder) == engines
    folder.engine_set.rename(tmp_path / "aside")  # another node replaces it at this moment
    monkeypatch.setattr(engine_set.time, "sleep", lambda _: (tmp_path / "aside").rename(folder.engine_set))
    assert read_engine_set(folder) == engines

    async def run():
        folder.engine_set.write_text("{")
        async with EngineClient(lambda: read_engine_set(folder), concurrency=4, timeout_s=5) as client:
            await client.generate([1], PARAMS)

    with pytest.raises(ConfigError, match=r"engines\.json cannot be read"):
        asyncio.run(run())


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


def test_whoever_waits_for_an_engine_waits_not_for_ever():
    async def run(url, timeout_s):
        async with EngineClient(lambda: of_urls([url]), concurrency=1, timeout_s=20) as client:
            await client.until_one_serves(timeout_s)

    async def served_one():
        async with served(Engine(7)) as url:
            await run(url, 20)

    asyncio.run(served_one())
    with pytest.raises(EngineError, match=r"no engine serves within 0.5 s \(http://127.0.0.1:9: "):
        asyncio.run(run("http://127.0.0.1:9", 0.5))
