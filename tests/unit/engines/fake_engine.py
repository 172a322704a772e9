"""An engine over HTTP that samples nothing."""

import asyncio
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

from dapo_megatron.engines.wire import SamplingParams

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
