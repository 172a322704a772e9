"""Which engines may be asked now: those of the engine set that say that they serve a version the trainer has pushed.

waits                 for
the follower          nothing: it looks at the set, and asks those that do not serve, again and again
`fewest_in_flight`    an engine that serves: the follower finds one, after a start or a failure
"""

import asyncio
from collections.abc import Callable

import aiohttp

from dapo_megatron.engines.engine_set import EngineSet, Member

LOOK_S = 1.0
"""Between two looks at the set while all serve."""
PROBE_S = 0.2
"""Between two questions to one that does not."""
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


class Server:
    """One start of an engine, and what it is asked."""

    def __init__(self, member: Member):
        self.member, self.url = member, member.url
        self.serves = False
        self.why_not = "it has not answered yet"
        self.in_flight = 0
        self.attempts: set[asyncio.Task[object]] = set()
        """Requests that are lost when the engine is replaced."""


class ServingEngines:
    """Follows the engine set for one client."""

    def __init__(self, read_set: Callable[[], EngineSet]):
        self._read_set = read_set
        self._generation: int | None = None
        self._servers: list[Server] = []
        self._changed = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None

    def start(self, session: aiohttp.ClientSession) -> None:
        """Begin to follow the set."""
        self._follower = asyncio.create_task(self._follow(session))
        self._follower.add_done_callback(lambda _: self._changed.set())

    async def stop(self) -> None:
        """Follow no longer."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)  # what failed was told to those who waited

    async def fewest_in_flight(self) -> Server:
        """The engine to ask next; waits until one serves.

        Raises:
            ConfigError: the set cannot be read.
        """
        while not (serving := [s for s in self._servers if s.serves]):
            if self._follower is not None and self._follower.done():
                self._follower.result()
            self._changed.clear()
            await self._changed.wait()
        return min(serving, key=lambda s: s.in_flight)

    def failed(self, server: Server, why: str) -> None:
        """It gave no answer: it is asked for nothing until it says again that it serves."""
        server.serves, server.why_not = False, why

    def why_none(self) -> str:
        """Why an engine is waited for."""
        return "; ".join(f"{s.url}: {s.why_not}" for s in self._servers if not s.serves) or "the engines are busy"

    async def _follow(self, session: aiohttp.ClientSession) -> None:
        while True:
            self._look()
            idle = [s for s in self._servers if not s.serves]
            await asyncio.gather(*(self._probe(s, session) for s in idle))
            await asyncio.sleep(PROBE_S if idle else LOOK_S)

    def _look(self) -> None:
        engines = self._read_set()
        if engines.generation == self._generation:
            return
        self._generation = engines.generation
        known = {s.member: s for s in self._servers}
        self._servers = [known[m] if m in known else Server(m) for m in engines.members]
        for member in known.keys() - set(engines.members):
            for attempt in known[member].attempts:
                attempt.cancel()

    async def _probe(self, server: Server, session: aiohttp.ClientSession) -> None:
        try:
            async with session.get(server.url + "/model_info", timeout=PROBE_TIMEOUT) as reply:
                if reply.status != 200:
                    server.why_not = f"HTTP {reply.status}"
                    return
                version = str((await reply.json())["weight_version"])
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as e:
            server.why_not = f"{type(e).__name__} {e}".strip()
            return
        server.serves = version.isdigit()
        server.why_not = f"it serves version {version}, which nobody pushed"
        if server.serves:
            self._changed.set()
