"""The link between trainer rank 0 and the controller: one ZeroMQ request at a time, msgspec messages, deadlines.

The trainer asks, the controller answers. An error on the controller's side comes back as `Failed` and is raised by the
trainer with the same one line.
"""

import msgspec
import zmq
import zmq.asyncio

from dapo_megatron.errors import DapoError


class Hello(msgspec.Struct, tag=True):
    """The trainer is up. `snapshot` is the controller's state out of the checkpoint that is resumed, or None."""

    snapshot: bytes | None
    step: int
    """The last finished step; 0 at the start."""


class NextBatch(msgspec.Struct, tag=True):
    """Version `version` is live on the engines; send the batch of `step`."""

    step: int
    version: int


class Evaluate(msgspec.Struct, tag=True):
    """Evaluate the live version on the held-out prompts."""

    step: int


class Goodbye(msgspec.Struct, tag=True):
    """The run is over."""


class Welcome(msgspec.Struct, tag=True):
    """The controller is ready."""

    verify_prompts: list[list[int]]
    """Fixed prompts whose log-probs are compared after a push."""


class Batch(msgspec.Struct, tag=True):
    """A step's batch (batching.wire), the rollout's metrics and the controller's state to put into the checkpoint."""

    payload: bytes
    metrics: dict[str, float]
    snapshot: bytes


class Evaluation(msgspec.Struct, tag=True):
    """Metrics of an evaluation."""

    metrics: dict[str, float]


class Done(msgspec.Struct, tag=True):
    """Nothing to say."""


class Failed(msgspec.Struct, tag=True):
    """The controller gave up, for this reason."""

    reason: str


Request = Hello | NextBatch | Evaluate | Goodbye
Reply = Welcome | Batch | Evaluation | Done | Failed

_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


class LinkClient:
    """The trainer's end."""

    def __init__(self, address: str):
        self.address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def ask(self, request: Request, *, deadline_s: float) -> Reply:
        """Send a request and wait for its reply.

        Raises:
            DapoError: no reply in time, or the controller failed.
        """
        self._socket.send(msgspec.msgpack.encode(request))
        if not self._socket.poll(deadline_s * 1000):
            raise DapoError(
                f"the controller at {self.address} did not answer {type(request).__name__} within {deadline_s:.0f} s: "
                "see logs/controller.log"
            )
        reply = _replies.decode(self._socket.recv())
        if isinstance(reply, Failed):
            raise DapoError(f"the controller stopped: {reply.reason}")
        return reply

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)


class LinkServer:
    """The controller's end."""

    def __init__(self, address: str):
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.bind(address)

    async def receive(self) -> Request:
        """The trainer's next request."""
        return _requests.decode(await self._socket.recv())

    async def reply(self, reply: Reply) -> None:
        """Answer the last request."""
        await self._socket.send(msgspec.msgpack.encode(reply))

    def close(self) -> None:
        """Close the socket, once what was sent is out (a second at most)."""
        self._context.destroy(linger=1000)
