"""The asynchronous client of the SGLang servers, and the handle on it that a rollout function is given."""

import asyncio
import random
import time
from collections import Counter
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


class EngineClient:
    """One HTTP session to all engines: bounded concurrency, retries of what can be retried, deadlines.

    Use as an async context manager. A request goes to the engine with the fewest requests in flight.
    """

    def __init__(self, urls: list[str], *, concurrency: int, timeout_s: float):
        self.urls = urls
        self.timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight: Counter[str] = Counter(dict.fromkeys(urls, 0))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "EngineClient":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def generate(self, input_ids: list[int], sampling: Sampling) -> Generation:
        """Sample one response.

        An aborted request is issued again: it is never mistaken for a truncated response.

        Raises:
            DapoError: the server refused the request, or no engine answered before the deadline.
        """
        body = {"input_ids": input_ids, "sampling_params": msgspec.to_builtins(sampling), "return_logprob": True}
        deadline = time.monotonic() + self.timeout_s
        pause, last = 0.1, "no engine was free"
        async with self._slots:
            while (left := deadline - time.monotonic()) > 0:
                url = min(self.urls, key=self._in_flight.__getitem__)
                self._in_flight[url] += 1
                try:
                    generation, last = await asyncio.wait_for(self._attempt(url, body), left)
                    if generation is not None:
                        return generation
                except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as e:
                    last = f"{url}: {type(e).__name__} {e}".strip()
                finally:
                    self._in_flight[url] -= 1
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, deadline - time.monotonic())))
                pause = min(pause * 2, 5.0)
        raise DapoError(
            f"no response from the engines within {self.timeout_s:.0f} s (last: {last}): see logs/engine-*.log"
        )

    async def _attempt(self, url: str, body: dict[str, Any]) -> tuple[Generation | None, str]:
        async with self._session.post(url + "/generate", json=body) as reply:
            data = await reply.read()
            if reply.status == 200:
                generation = await asyncio.to_thread(decode_generation, data)
                return generation, f"{url}: aborted"
            text = " ".join(data[:500].decode(errors="replace").split())
            if reply.status in (408, 429) or reply.status >= 500:
                return None, f"{url}: HTTP {reply.status} {text}"
            raise DapoError(f"{url}/generate refused a request of {len(body['input_ids'])} tokens: {text}")


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


_decoder = msgspec.json.Decoder(_Reply)


def decode_generation(data: bytes) -> Generation | None:
    """Decode SGLang's reply to /generate; None for an aborted request.

    Raises:
        DapoError: a weight version that this project did not set.
    """
    meta = _decoder.decode(data).meta_info
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
