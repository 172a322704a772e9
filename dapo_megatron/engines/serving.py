"""Which engines may be asked now: those of the engine set that say that they serve a version the trainer has pushed.

    it gives no answer, or HTTP 500 and above         -> put aside; what it owes is asked of others
    it is silent: its scheduler answers nothing       -> the same, and its requests are taken from it
    it rests: 1 s, twice as long each time it fails   -> probed; serves again, if its scheduler answers

waits                 for
the follower          nothing: it looks at the set, and asks every engine that owes an answer, and has given none
                      since the last look, for a sign of life
`least_busy`          an engine that serves: the follower finds one, after a start or a failure

A sign of life is an answer to /server_info: its scheduler has a part in it, which costs it as much as a few tokens.
SGLang's /health generates a token, which would disturb exact runs and fails while an engine is paused.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import aiohttp

from dapo_megatron.engines.engine_set import EngineSet, Member

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the set while all serve."""
PROBE_S = 0.2
"""Between two questions to one that does not."""
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
FIRST_REST_S, LONGEST_REST_S = 1.0, 30.0
"""Of one that failed, before it is probed."""


class Server:
    """One start of an engine, and what it is asked."""

    def __init__(self, member: Member):
        self.member, self.url = member, member.url
        self.serves = False
        self.why_not = "it has not answered yet"
        self.responses = 0
        """In flight."""
        self.tokens_in_flight = 0
        """Prompts, and as much of the responses as is expected."""
        self.attempts: set[asyncio.Task[object]] = set()
        """Requests that are lost when the engine is replaced or silent."""
        self.failures = 0
        """Since it last answered a request."""
        self.rests_until = 0.0
        """By the event loop's clock."""
        self.silent_since: float | None = None
        self.has_answered = False
        """A request, since the last look."""

    def rest(self, now: float) -> None:
        """It is not probed for a while."""
        if self.failures:
            self.rests_until = now + min(FIRST_REST_S * 2 ** min(self.failures - 1, 10), LONGEST_REST_S)

    def give_up(self, why: str) -> None:
        """Take its requests from it."""
        self.serves, self.why_not = False, why
        for attempt in self.attempts:
            attempt.cancel()


class ServingEngines:
    """Follows the engine set for one client."""

    def __init__(self, read_set: Callable[[], EngineSet], silence_s: float, concurrency: int):
        """
        Args:
            silence_s: seconds without a sign of life after which an engine loses its requests.
            concurrency: most responses in flight on all engines together.
        """
        self._read_set, self._silence_s, self._concurrency = read_set, silence_s, concurrency
        self._generation: int | None = None
        self._servers: list[Server] = []
        self._changed = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._responses, self._tokens = 0, 0

    def start(self, session: aiohttp.ClientSession) -> None:
        """Begin to follow the set."""
        self._follower = asyncio.create_task(self._follow(session))
        self._follower.add_done_callback(lambda _: self._changed.set())

    async def stop(self) -> None:
        """Follow no longer."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)  # what failed was told to those who waited

    async def least_busy(self, limit: asyncio.Timeout | None = None) -> Server:
        """The engine to ask next, that with the fewest tokens in flight; waits until one serves and has room.

        None gets more than its share of the concurrency, also when others are away: what it cannot run, a push's
        verification would wait for.

        Args:
            limit: does not run while those that serve have no room.

        Raises:
            ConfigError: the set cannot be read.
        """
        while not (serving := [s for s in self._servers if s.serves and s.responses < self.share]):
            if self._follower is not None and self._follower.done():
                self._follower.result()
            self._changed.clear()
            has_no_room = any(s.serves for s in self._servers)
            with _put_off(limit) if has_no_room and limit is not None else nullcontext():
                await self._changed.wait()
        return min(serving, key=lambda s: s.tokens_in_flight)

    @property
    def share(self) -> int:
        """Most responses in flight on one engine, but for those that travel with the last one."""
        return -(-self._concurrency // max(1, len(self._servers)))

    def freed(self, server: Server, responses: int, tokens: int) -> None:
        """These are no longer in flight."""
        server.responses -= responses
        server.tokens_in_flight -= tokens
        self._changed.set()

    def expected_tokens(self, prompt: int, limit: int) -> int:
        """Of a prompt and its response: as long as responses were on the average, `limit` before there were any."""
        mean = self._tokens // self._responses if self._responses else limit
        return prompt + min(limit, mean)

    def answered(self, server: Server, lengths: Sequence[int]) -> None:
        """It has answered a request, with responses of these lengths."""
        server.failures, server.silent_since, server.has_answered = 0, None, True
        self._responses += len(lengths)
        self._tokens += sum(lengths)

    def failed(self, server: Server, why: str) -> None:
        """It is asked for nothing until it has rested, and says again that it serves."""
        if server.serves:  # others of its requests may have told
            server.serves, server.why_not = False, why
            server.failures += 1
            server.rest(asyncio.get_running_loop().time())
            log.warning("%s is put aside: %s", server.member.name, why)

    def why_none(self) -> str:
        """Why an engine is waited for."""
        return "; ".join(f"{s.url}: {s.why_not}" for s in self._servers if not s.serves) or "the engines are busy"

    async def _follow(self, session: aiohttp.ClientSession) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            self._look()
            due = [s for s in self._servers if s.rests_until <= clock()]
            await asyncio.gather(*((self._watch if s.serves else self._probe)(s, session) for s in due))
            await asyncio.sleep(LOOK_S if all(s.serves for s in self._servers) else PROBE_S)

    def _look(self) -> None:
        engines = self._read_set()
        if engines.generation == self._generation:
            return
        self._generation = engines.generation
        known = {s.member: s for s in self._servers}
        self._servers = [known[m] if m in known else Server(m) for m in engines.members]
        for member in known.keys() - set(engines.members):
            known[member].give_up("it was replaced")

    async def _watch(self, server: Server, session: aiohttp.ClientSession) -> None:
        """One that serves; while it owes nothing, nobody waits for it."""
        if not server.attempts or server.has_answered:
            server.silent_since, server.has_answered = None, False
            return
        began = asyncio.get_running_loop().time()
        trouble = await _trouble(server, session)
        if why := self._silence(server, trouble, began):
            self.failed(server, why)
            server.give_up(why)

    async def _probe(self, server: Server, session: aiohttp.ClientSession) -> None:
        """One that does not: whether it serves now."""
        began, version = asyncio.get_running_loop().time(), ""
        try:
            async with session.get(server.url + "/model_info", timeout=PROBE_TIMEOUT) as reply:
                trouble = None if reply.status == 200 else f"HTTP {reply.status}"
                version = "" if trouble else str((await reply.json())["weight_version"])
        except (aiohttp.ClientError, TimeoutError, KeyError, TypeError, ValueError) as e:
            trouble = f"{type(e).__name__} {e}".strip()
        if version.isdigit():
            trouble = await _trouble(server, session)
        server.serves = trouble is None and version.isdigit()
        server.why_not = trouble or f"it serves version {version}, which nobody pushed"
        if why := self._silence(server, trouble, began):
            server.give_up(why)
        if server.serves:
            if server.failures:
                log.info("%s serves again", server.member.name)
            self._changed.set()
        else:
            server.rest(asyncio.get_running_loop().time())

    def _silence(self, server: Server, trouble: str | None, began: float) -> str | None:
        """Why an engine without a sign of life at two questions has been silent for too long; None: it has not.

        Args:
            began: when it was asked the second time.
        """
        if trouble is None:
            server.silent_since = None
        elif server.silent_since is None:
            server.silent_since = began
        elif (silence := asyncio.get_running_loop().time() - server.silent_since) >= self._silence_s:
            return f"no sign of life for {silence:.0f} s ({trouble})"
        return None


@contextmanager
def _put_off(limit: asyncio.Timeout) -> Iterator[None]:
    """It does not run in this block."""
    clock, when = asyncio.get_running_loop().time, limit.when()
    began = clock()
    limit.reschedule(None)
    yield
    limit.reschedule(None if when is None else when + clock() - began)


async def _trouble(server: Server, session: aiohttp.ClientSession) -> str | None:
    """Why it gives no sign of life; None: it does."""
    try:
        async with session.get(server.url + "/server_info", timeout=PROBE_TIMEOUT) as reply:
            await reply.read()
            return f"/server_info: HTTP {reply.status}" if reply.status >= 500 else None
    except (aiohttp.ClientError, TimeoutError) as e:
        return f"/server_info: {type(e).__name__} {e}".strip()
