"""The link between trainer and controller: one ZeroMQ request of a rank at a time, msgspec messages, deadlines.

An error on the controller's side comes back as `Failed` and is raised by the trainer with the same one line. Both ends
know each other by their keys (ZeroMQ CURVE): what anybody else sends is dropped before it is read.
"""

import asyncio
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from dapo_megatron.errors import DapoError, error_of_kind
from dapo_megatron.keys import Keys
from dapo_megatron.messages import Failed, Reply, Request

_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


LOOK_S = 0.5
"""Between two looks for what interrupts a wait."""
MESSAGE_BYTES = 2 << 30
"""No message is as long: what is large travels in parts."""


class RpcClient:
    """The trainer's end."""

    def __init__(self, address: str, keys: Keys):
        self.address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.curve_serverkey = keys.controller.public.encode()
        self._socket.curve_publickey = keys.trainer.public.encode()
        self._socket.curve_secretkey = keys.trainer.secret.encode()
        self._socket.connect(address)

    def ask(self, request: Request, *, deadline_s: float) -> Reply:
        """Send a request and wait for its reply; raises as `receive`."""
        self.send(request, deadline_s=deadline_s)
        reply = self.receive(lambda: False)
        assert reply is not None
        return reply

    def send(self, request: Request, *, deadline_s: float) -> None:
        """Send a request, to be answered before the deadline.

        Raises:
            DapoError: it is too long a message.
        """
        self._asked, self._deadline_s, self._sent = request, deadline_s, time.monotonic()
        self._socket.send(_encoded(request))

    def receive(self, is_interrupted: Callable[[], bool]) -> Reply | None:
        """Wait for the reply; None when the wait was interrupted, and may be taken up again.

        Raises:
            DapoError: no reply in time, or the controller failed (its own kind of error).
        """
        while not self._socket.poll(int(LOOK_S * 1000)):
            if is_interrupted():
                return None
            if time.monotonic() - self._sent > self._deadline_s:
                raise DapoError(
                    f"the controller at {self.address} did not answer {type(self._asked).__name__} within "
                    f"{self._deadline_s:.0f} s: see logs/latest/controller.log"
                )
        reply = _replies.decode(self._socket.recv(copy=False).buffer)
        if isinstance(reply, Failed):
            raise error_of_kind(reply.kind, f"the controller stopped: {reply.reason}")
        return reply

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)


class RpcServer:
    """The controller's end; made inside a running event loop."""

    def __init__(self, address: str, keys: Keys):
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _Only(keys.trainer.public))
        self._socket = self._context.socket(zmq.REP)
        self._socket.curve_server = True
        self._socket.curve_secretkey = keys.controller.secret.encode()
        self._socket.curve_publickey = keys.controller.public.encode()
        self._socket.bind(address)

    async def receive(self) -> Request:
        """The trainer's next request.

        Raises:
            DapoError: not a request: the trainer is another version of this program.
        """
        try:
            return _requests.decode(await self._socket.recv())
        except msgspec.MsgspecError as e:
            raise DapoError(f"the trainer sent what is no request ({e}): do both run the same version?") from None

    async def reply(self, reply: Reply) -> None:
        """Answer the last request.

        Raises:
            DapoError: it is too long a message; nothing was sent.
        """
        data = await asyncio.to_thread(_encoded, reply)  # a part of a batch takes milliseconds
        await self._socket.send(data, copy=False)

    def close(self) -> None:
        """Close the socket, once what was sent is out (a second at most)."""
        self._authenticator.stop()
        self._context.destroy(linger=1000)


def _encoded(message: Request | Reply) -> bytes:
    data = msgspec.msgpack.encode(message)
    if len(data) >= MESSAGE_BYTES:
        raise DapoError(f"{type(message).__name__} takes {len(data) / 2**30:.1f} GiB, and a message can carry 2")
    return data


class _Only:
    """Lets in one client, by its public key."""

    def __init__(self, public: str):
        self._public = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public
