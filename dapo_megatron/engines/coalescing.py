"""Requests for short responses that are equal and made at once, such as the samples of one group, travel as one.

For those, an HTTP request costs as much as sampling. Long ones go alone: each is graded, and its slot free, when it
ends, and is lost alone when its engine dies.
"""

import asyncio
from functools import partial

import msgspec

from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.wire import Sampled, SamplingParams

TOGETHER_TOKENS = 512
"""Longest responses whose requests travel together."""

Future = asyncio.Future[Sampled]
Key = tuple[tuple[int, ...], bytes]


class CoalescingClient:
    """Over a client that knows nothing of it."""

    def __init__(self, client: EngineClient):
        self._client = client
        self._waiting: dict[Key, list[Future]] = {}
        self._sends: set[asyncio.Task[list[Sampled]]] = set()

    @property
    def asked_again(self) -> int:
        """Requests that an engine left unanswered or aborted, each time counted."""
        return self._client.asked_again

    async def generate(self, input_ids: list[int], params: SamplingParams) -> Sampled:
        """Sample one response.

        Raises:
            EngineError: as EngineClient.generate.
        """
        if params.max_new_tokens > TOGETHER_TOKENS:
            (completion,) = await self._client.generate(input_ids, params)
            return completion
        loop = asyncio.get_running_loop()
        response: Future = loop.create_future()
        key = (tuple(input_ids), msgspec.json.encode(params))
        if key in self._waiting:
            self._waiting[key].append(response)
        else:
            self._waiting[key] = [response]
            loop.call_soon(self._dispatch, key, input_ids, params)
        return await response

    def _dispatch(self, key: Key, input_ids: list[int], params: SamplingParams) -> None:
        """Send what is waiting under one key, at most as many together as one engine may have in flight."""
        waiting = [r for r in self._waiting.pop(key) if not r.done()]
        together = self._client.share
        for start in range(0, len(waiting), together):
            part = waiting[start : start + together]
            send = asyncio.ensure_future(self._client.generate(input_ids, params, len(part)))
            self._sends.add(send)
            send.add_done_callback(partial(self._answered, part))
            for response in part:
                response.add_done_callback(partial(_cancel_unwanted, send, part))

    def _answered(self, responses: list[Future], send: asyncio.Task[list[Sampled]]) -> None:
        """Whatever ended the request is what those hear who wait for it."""
        self._sends.discard(send)
        error = None if send.cancelled() else send.exception()
        for i, response in enumerate(responses):
            if response.done():
                continue
            if send.cancelled():
                response.cancel()
            elif error is not None:
                response.set_exception(error)
            else:
                response.set_result(send.result()[i])


def _cancel_unwanted(send: asyncio.Task[list[Sampled]], responses: list[Future], _: Future) -> None:
    """Nobody waits for any of a request's responses any more: closing its connection ends it on the engine too."""
    if all(r.cancelled() for r in responses):
        send.cancel()
