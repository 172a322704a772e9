"""The asynchronous client of the SGLang servers, and the handle on it that a rollout function is given."""

import asyncio
import random
import time
from collections import Counter
from functools import partial
from typing import Any, Literal

import aiohttp
import msgspec

from dapo_megatron.errors import DapoError
from dapo_megatron.records import VersionSpan


class Sampling(msgspec.Struct, frozen=True):
    """How one response is sampled; field names are SGLang's."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: list[int] = []


class Generation(msgspec.Struct):
    """What the engine sampled after the input: one entry a token, the stop token included."""

    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[VersionSpan]
    finish_reason: Literal["stop", "length"]


TOGETHER_TOKENS = 512
"""Longest responses whose requests travel together: for those, an HTTP request costs as much as sampling."""


class EngineClient:
    """One HTTP session to all engines: bounded concurrency, retries of what can be retried, deadlines.

    Use as an async context manager. A request goes to the engine with the fewest responses in flight. Requests for
    short responses that are equal and made at once, such as the samples of one group, travel as one.
    """

    def __init__(self, urls: list[str], *, concurrency: int, timeout_s: float):
        self.urls = urls
        self.timeout_s = timeout_s
        self._concurrency = concurrency
        self._slots, self._turn = asyncio.Semaphore(concurrency), asyncio.Lock()
        self._in_flight: Counter[str] = Counter(dict.fromkeys(urls, 0))
        self._session: aiohttp.ClientSession | None = None
        self._waiting: dict[tuple, list[asyncio.Future[Generation]]] = {}
        self._sends: set[asyncio.Task] = set()

    async def __aenter__(self) -> "EngineClient":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)
        )
        return self

    async def __aexit__(self, *_) -> None:
        for send in self._sends:
            send.cancel()
        await self._session.close()

    async def generate(self, input_ids: list[int], sampling: Sampling) -> Generation:
        """Sample one response.

        An aborted request is issued again: it is never mistaken for a truncated response.

        Raises:
            DapoError: the server refused the request, or no engine answered before the deadline.
        """
        response = asyncio.get_running_loop().create_future()
        # Long ones go alone: each is graded, and its slot free, when it ends, and is lost alone when its engine dies.
        alone = id(response) if sampling.max_new_tokens > TOGETHER_TOKENS else None
        key = (tuple(input_ids), msgspec.json.encode(sampling), alone)
        if key in self._waiting:
            self._waiting[key].append(response)
        else:
            self._waiting[key] = [response]
            asyncio.get_running_loop().call_soon(self._dispatch, key, input_ids, sampling)
        return await response

    def _dispatch(self, key: tuple, input_ids: list[int], sampling: Sampling) -> None:
        """Send what is waiting under one key, at most as many responses together as may be in flight."""
        waiting = self._waiting.pop(key)
        for start in range(0, len(waiting), self._concurrency):
            part = waiting[start : start + self._concurrency]
            send = asyncio.ensure_future(self._send(input_ids, sampling, part))
            self._sends.add(send)
            send.add_done_callback(partial(self._sent, part))
            for response in part:
                response.add_done_callback(partial(_cancel_unwanted, send, part))

    def _sent(self, responses: list[asyncio.Future], send: asyncio.Task) -> None:
        """Whatever ended a request is what those hear who have no response."""
        self._sends.discard(send)
        for response in responses:
            if send.cancelled():
                response.cancel()
            elif not response.done():
                response.set_exception(send.exception())

    async def _send(self, input_ids: list[int], sampling: Sampling, responses: list[asyncio.Future]) -> None:
        async with self._turn:  # two that each wait for several slots would wait for each other
            for _ in responses:
                await self._slots.acquire()
        try:
            await self._until_answered(input_ids, sampling, responses, time.monotonic() + self.timeout_s)
        finally:
            for _ in responses:
                self._slots.release()

    async def _until_answered(self, input_ids: list[int], sampling: Sampling, responses: list, deadline: float) -> None:
        pause, last = 0.1, "no engine was free"
        while left_out := [r for r in responses if not r.done()]:
            if (left := deadline - time.monotonic()) <= 0:
                raise DapoError(
                    f"no response from the engines within {self.timeout_s:.0f} s (last: {last}): see logs/engine-*.log"
                )
            url = min(self.urls, key=self._in_flight.__getitem__)
            self._in_flight[url] += len(left_out)
            try:
                found, last = await asyncio.wait_for(self._attempt(url, input_ids, sampling, len(left_out)), left)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as e:
                found, last = [], f"{url}: {type(e).__name__} {e}".strip()
            finally:
                self._in_flight[url] -= len(left_out)
            for response, generation in zip(left_out, found, strict=False):
                if not response.done():
                    response.set_result(generation)
            if len(found) < len(left_out):
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, deadline - time.monotonic())))
                pause = min(pause * 2, 5.0)

    async def _attempt(
        self, url: str, input_ids: list[int], sampling: Sampling, count: int
    ) -> tuple[list[Generation], str]:
        """At most `count` responses, and what became of the rest."""
        # Copies instead of SGLang's n: with that, a server first prefills the prompt, alone, and then answers.
        inputs = input_ids if count == 1 else [input_ids] * count
        body = {"input_ids": inputs, "sampling_params": msgspec.to_builtins(sampling), "return_logprob": True}
        async with self._session.post(url + "/generate", json=body) as reply:
            data = await reply.read()
            if reply.status == 200:
                generations = await asyncio.to_thread(decode_generations, data)
                return [g for g in generations if g is not None], f"{url}: aborted"
            text = " ".join(data[:500].decode(errors="replace").split())
            if reply.status in (408, 429) or reply.status >= 500:
                return [], f"{url}: HTTP {reply.status} {text}"
            raise DapoError(f"{url}/generate refused a request of {len(input_ids)} tokens: {text}")


def _cancel_unwanted(send: asyncio.Task, responses: list[asyncio.Future], _: asyncio.Future) -> None:
    """Nobody waits for any of a request's responses any more: closing its connection ends it on the engine too."""
    if all(r.cancelled() for r in responses):
        send.cancel()


class _FinishReason(msgspec.Struct):
    type: str


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _FinishReason
    output_token_logprobs: list[tuple[float, int, Any]]
    weight_version: str
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    meta_info: _Meta


_decoder = msgspec.json.Decoder(_Reply | list[_Reply])


def decode_generations(data: bytes) -> list[Generation | None]:
    """Decode SGLang's reply to /generate, of one response or of several; None for an aborted one.

    Raises:
        DapoError: a weight version that this project did not set.
    """
    replies = _decoder.decode(data)
    return [_generation(reply.meta_info) for reply in (replies if isinstance(replies, list) else [replies])]


def _generation(meta: _Meta) -> Generation | None:
    if meta.finish_reason.type == "abort":
        return None
    tokens = meta.output_token_logprobs
    # Servers before 0.5.2x report one version for the whole response.
    spans = meta.weight_versions or [_Span(meta.weight_version, 0, len(tokens))]
    if not all(span.version.isdigit() for span in spans):
        raise DapoError(f"an engine serves weights of version '{spans[-1].version}': no version was pushed to it")
    return Generation(
        token_ids=[token for _, token, _ in tokens],
        logprobs=[logprob for logprob, _, _ in tokens],
        version_spans=[VersionSpan(int(s.version), s.start, s.end) for s in spans],
        finish_reason="length" if meta.finish_reason.type == "length" else "stop",
    )


class Engine:
    """What a rollout function sees: sampling for one sample of one group, and the tokenizer."""

    def __init__(self, client: EngineClient, tokenizer: Any, sampling: Sampling, sample: int):
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.sample = sample
        self._client = client

    async def generate(self, input_ids: list[int], max_new_tokens: int | None = None) -> Generation:
        """Sample a continuation of input_ids; max_new_tokens lowers the run's limit (for further turns)."""
        limit = self.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        return await self._client.generate(input_ids, msgspec.structs.replace(self.sampling, max_new_tokens=limit))

    def decode(self, token_ids: list[int]) -> str:
        """Text of a response without its special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
