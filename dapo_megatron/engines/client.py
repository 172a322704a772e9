"""The asynchronous client of the SGLang servers: bounded concurrency, retries of what can be retried, deadlines."""

import asyncio
import random
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from dapo_megatron.engines.cache_keys import CacheKeys
from dapo_megatron.engines.engine_set import EngineSet
from dapo_megatron.engines.serving import Server, ServingEngines
from dapo_megatron.engines.wire import Sampled, SamplingParams, decode_sampled, generate_request
from dapo_megatron.errors import EngineError

REFUSED_FOR_NOW = (408, 429)
"""HTTP statuses of a server that may take the request later; one with 500 or above has failed."""

BLAMES = 2
"""How often one request may have an engine put aside that answers HTTP 500 or above: then it is the request."""


class Unanswered(EngineError):
    """No engine has finished a request before its deadline: the group it belongs to is issued again."""


class EngineClient:
    """One HTTP session to all engines; use as an async context manager.

    A request goes to the engine with the fewest tokens in flight, of those that serve. One that gave no answer, or
    fails, is put aside (engines.serving); what it was asked for is asked of another.
    """

    def __init__(
        self,
        read_set: Callable[[], EngineSet],
        *,
        concurrency: int,
        timeout_s: float,
        silence_s: float = 60.0,
        api_key: str | None = None,
        fresh_prefixes: bool = False,
    ):
        """
        Args:
            read_set: who serves now.
            concurrency: most responses in flight on all engines together.
            timeout_s: seconds for one request, retries included, but not the waits for a slot, or for room on the
                engines that serve while others are away.
            silence_s: seconds without a sign of life after which an engine's requests are asked of others.
            api_key: what the servers were started with.
            fresh_prefixes: use no keys and values but those of requests in flight: pushes leave old ones behind.
        """
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.asked_again = 0
        """Requests that an engine left unanswered or aborted, each time counted."""
        self._slots, self._turn = asyncio.Semaphore(concurrency), asyncio.Lock()
        self._serving = ServingEngines(read_set, silence_s, concurrency)
        self._cache_keys = CacheKeys() if fresh_prefixes else None
        self._open: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._open = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            headers=self._headers,
        )
        self._serving.start(self._open)
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._serving.stop()
        await self._session.close()

    async def until_one_serves(self, timeout_s: float) -> None:
        """Wait until there is an engine to ask.

        Raises:
            EngineError: there is none in time; says why.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._serving.least_busy()
        except TimeoutError:
            raise EngineError(f"no engine serves within {timeout_s:g} s ({self._serving.why_none()})") from None

    @property
    def share(self) -> int:
        """Most responses in flight on one engine, but for those that travel with the last one."""
        return self._serving.share

    async def generate(self, input_ids: list[int], params: SamplingParams, count: int = 1) -> list[Sampled]:
        """`count` samples after one input, in one request.

        Aborted ones are asked for again: they are never mistaken for truncated responses.

        Raises:
            Unanswered: no engine answered before the deadline.
            EngineError: the server refused the request.
            ValueError: more samples than may be in flight.
        """
        if count > self.concurrency:
            raise ValueError(f"{count} samples in one request, {self.concurrency} may be in flight")
        held, began = 0, asyncio.get_running_loop().time()
        try:
            async with self._turn:  # two that each wait for several slots would wait for each other
                while held < count:
                    await self._slots.acquire()
                    held += 1
            waited_s = asyncio.get_running_loop().time() - began
            return await self._until_answered(input_ids, params, count, waited_s)
        finally:
            for _ in range(held):
                self._slots.release()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._open is None:
            raise RuntimeError("EngineClient is used outside its `async with`")
        return self._open

    async def _until_answered(
        self, input_ids: list[int], params: SamplingParams, count: int, waited_s: float
    ) -> list[Sampled]:
        """`waited_s` is the wait for slots."""
        loop = asyncio.get_running_loop()
        pause, last, tries, deadline = 0.1, "", 0, loop.time() + self.timeout_s
        found: list[Sampled] = []
        while (missing := count - len(found)) > 0:
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    some, last = await self._ask(input_ids, params, missing, limit, blames=tries < BLAMES)
                    before, deadline = deadline, limit.when() or deadline
                    waited_s += deadline - before
            except TimeoutError:
                raise Unanswered(
                    f"no response from the engines within {self.timeout_s:.0f} s (last: "
                    f"{last or self._serving.why_none()}): see logs/latest/engine-*.log"
                ) from None
            found += [msgspec.structs.replace(s, waited_s=waited_s) for s in some]
            tries += 1
            if len(some) < missing:
                self.asked_again += 1
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, deadline - loop.time())))
                pause = min(pause * 2, 5.0)
        return found

    async def _ask(
        self, input_ids: list[int], params: SamplingParams, count: int, limit: asyncio.Timeout, *, blames: bool
    ) -> tuple[list[Sampled], str]:
        """What one engine gives: at most `count` completions, and what became of the rest.

        Args:
            limit: put off by the wait for room.
            blames: whether HTTP 500 or above is the engine's fault.
        """
        server = await self._serving.least_busy(limit)
        tokens = count * self._serving.expected_tokens(len(input_ids), params.max_new_tokens)
        server.responses += count
        server.tokens_in_flight += tokens
        attempt = asyncio.ensure_future(self._attempt(server, input_ids, params, count, blames))
        server.attempts.add(attempt)
        try:
            await asyncio.wait([attempt])
            return attempt.result()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not attempt.cancelled() or (task is not None and task.cancelling()):  # it is this call that is cancelled
                raise
            return [], f"{server.url}: {server.why_not}"
        except (aiohttp.ClientError, TimeoutError) as e:
            last = f"{server.url}: {type(e).__name__} {e}".strip()
            self._serving.failed(server, last)
            return [], last
        finally:
            attempt.cancel()
            server.attempts.discard(attempt)
            self._serving.freed(server, count, tokens)

    async def _attempt(
        self, server: Server, input_ids: list[int], params: SamplingParams, count: int, blames: bool
    ) -> tuple[list[Sampled], str]:
        """At most `count` completions, and what became of the rest."""
        url = server.url
        with self._cache_keys.key_for(input_ids) if self._cache_keys else nullcontext() as key:
            body = generate_request(input_ids, params, count, key)
            async with self._session.post(url + "/generate", json=body) as reply:
                status, data = reply.status, await reply.read()
        if status == 200:
            completions = await asyncio.to_thread(decode_sampled, data, url)
            found = [c for c in completions if c is not None][:count]
            self._serving.answered(server, [len(c.token_ids) for c in found])
            return found, f"{url}: aborted"
        why = f"HTTP {status} {' '.join(data[:500].decode(errors='replace').split())}"
        if status >= 500 and blames:
            self._serving.failed(server, why)
        elif status < 500 and status not in REFUSED_FOR_NOW:
            raise EngineError(f"engine {url} refused /generate of {len(input_ids)} tokens: {why}")
        return [], f"{url}: {why}"
