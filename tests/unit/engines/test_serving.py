"""Which engine may be asked: none that is gone, rests, or serves what nobody pushed."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from dapo_megatron.engines import serving
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.engine_set import EngineSet, Member, of_urls
from dapo_megatron.errors import EngineError
from tests.unit.engines.fake_engine import Engine, served, tokens


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
