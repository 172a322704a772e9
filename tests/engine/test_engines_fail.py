"""Engines fail in the middle of a step, the step does not: client, producer and controller on two real servers."""

import asyncio
import random
import shutil
import signal
from collections import Counter
from contextlib import asynccontextmanager, suppress

import aiohttp
import psutil
import pytest
import transformers
from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_megatron.engines import serving
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.grading.pool import grading_pool
from dapo_megatron.messages import Goodbye, Hello, NextBatch
from dapo_megatron.process import Reporter
from dapo_megatron.rollout.controller import Controller
from dapo_megatron.rollout.ledger import SETTLED, check_exactly_once, read_ledger
from dapo_megatron.run_folder import RunFolder
from launch.demo import write_data, write_model
from tests.engine.conftest import serve
from tests.tiny import run_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS, SIZE, DEADLINE_S = 6, 4, 30.0


def odd(text, truth):
    """Right or wrong, about as often."""
    return len(text) % 2 == 1


@pytest.fixture
def config(tmp_path, model_path):
    """Of the servers' model, with a tokenizer beside it."""
    folder = tmp_path / "model"
    shutil.copytree(model_path, folder)
    write_model(tmp_path / "demo")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "demo").save_pretrained(folder)
    write_data(tmp_path, random.Random(0))
    return run_config(
        folder,
        data={"train": str(tmp_path / "train.jsonl"), "template": "plain", "chat": False},
        rollout={"prompts_per_step": PROMPTS, "group_size": SIZE, "max_response_tokens": 300, "temperature": 1.5},
        grading={"grader": f"{__name__}:odd"},
        trainer={"mini_batch_prompts": 2},
    )


class Link:
    """The trainer's side."""

    def __init__(self):
        self.requests, self.replies = asyncio.Queue(), asyncio.Queue()

    async def receive(self):
        return await self.requests.get()

    async def reply(self, message):
        await self.replies.put(message)

    async def ask(self, request):
        await self.requests.put(request)
        return await self.replies.get()


class Proxy:
    """Passes requests on, until it is out of order: then even what is under way comes back with HTTP 500."""

    def __init__(self, url):
        self.url, self.is_broken, self.refused = url, False, 0

    async def pass_on(self, request):
        async with aiohttp.ClientSession() as session:
            sent = {"data": await request.read(), "headers": {"Content-Type": request.content_type}}
            async with session.request(request.method, self.url + request.path, **sent) as reply:
                data = await reply.read()
        if self.is_broken and request.path == "/generate":
            self.refused += 1
            return web.Response(status=500, text="out of order")
        return web.Response(status=reply.status, body=data, content_type=reply.content_type)


@asynccontextmanager
async def proxied(url):
    proxy, app = Proxy(url), web.Application()
    app.router.add_route("*", "/{path}", proxy.pass_on)
    async with TestServer(app) as server:
        yield proxy, str(server.make_url("")).rstrip("/")


def strike(processes, number):
    """A signal to those that are there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


async def until(is_so):
    while not is_so():
        await asyncio.sleep(0.02)


async def failing_steps(config, folder, client, engines, first, second, processes):
    """Steps in whose middle the second engine fails in one way after another; engines[0] is who serves."""
    link = Link()

    def serves(*urls):
        number = engines[0].generation + 1
        engines[0] = EngineSet(number, tuple(Member(f"engine-{url[-5:]}", url, number) for url in urls))
        return until(lambda: [s.url for s in client._serving._servers if s.serves] == list(urls))

    def of(url):
        return {s.url: s for s in client._serving._servers}[url]

    async def step(number, url, fail):
        reply = asyncio.create_task(link.ask(NextBatch(number, 0)))
        await until(lambda: of(url).tokens_in_flight)
        await asyncio.sleep(0.3)
        assert of(url).tokens_in_flight and not reply.done()
        await fail()
        return await reply

    async with grading_pool(config) as grading:
        with Reporter(RunFolder(folder), "controller") as reporter:
            controller = Controller(config, reporter, CoalescingClient(client), grading)
            process = asyncio.create_task(controller.serve(link))
            await link.ask(Hello(0))

            async with proxied(second) as (proxy, url):
                await serves(first, url)

                async def answers_500():
                    proxy.is_broken = True

                replies = [await step(1, url, answers_500)]
                assert proxy.refused
                proxy.is_broken = False

            await serves(first, second)

            async def stops():
                strike(processes, signal.SIGSTOP)

            replies.append(await step(2, second, stops))
            assert not of(second).serves
            strike(processes, signal.SIGCONT)
            await until(lambda: of(second).serves)

            await serves(second)

            async def stops_for_too_long():
                strike(processes, signal.SIGSTOP)
                await asyncio.sleep(DEADLINE_S + 2)
                strike(processes, signal.SIGCONT)

            replies.append(await step(3, second, stops_for_too_long))

            await serves(first, second)

            async def dies():
                strike(processes, signal.SIGKILL)

            replies.append(await step(4, second, dies))
            await link.ask(Goodbye())
            await process
            await controller.close()
    return replies


def test_a_step_is_completed_by_the_other_engine_and_every_prompt_is_settled_once(
    config, engine_url, model_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(serving, "PROBE_TIMEOUT", aiohttp.ClientTimeout(total=1.0))
    with serve(model_path, tmp_path / "logs") as (second, pid):
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for url in (engine_url, second):
            control = EngineControl(url, 60)
            control.set_version(0)
            control.close()
        engines = [EngineSet(1, (Member("engine-0", engine_url), Member("engine-1", second)))]

        async def run():
            async with EngineClient(
                lambda: engines[0], concurrency=4 * SIZE, timeout_s=DEADLINE_S, silence_s=2.0
            ) as client:
                return await failing_steps(config, tmp_path / "run", client, engines, engine_url, second, processes)

        replies = asyncio.run(run())

    entries = read_ledger(RunFolder(tmp_path / "run").ledger)
    audit = check_exactly_once(entries)
    assert audit.problems == []
    last = {e.order: e.fate for e in entries}
    assert set(last.values()) <= {*SETTLED, "carried"}
    kept = Counter(e.step for e in entries if e.fate == "kept")
    assert kept == dict.fromkeys(range(1, 5), PROMPTS)
    assert [reply.metrics["groups/kept"] for reply in replies] == [PROMPTS] * 4
    # Only where no other engine served was a group left unfinished.
    unfinished = [reply.metrics["groups/unfinished"] for reply in replies]
    assert unfinished[0] == unfinished[1] == unfinished[3] == 0 and unfinished[2] > 0
    assert Counter(e.step for e in entries if e.fate == "unfinished") == {3: unfinished[2]}
