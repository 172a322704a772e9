"""TCP ports for servers that start later."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LOCALHOST = "127.0.0.1"


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """TCP ports of this machine that nothing else gets by chance before the server they are meant for listens on them.

    An engine listens some twenty seconds after it was started, and other sockets are given ports meanwhile. A socket
    that is bound and does not listen keeps its port from all that ask for any port; SO_REUSEADDR lets in a server that
    asks for this one with the same option, as uvicorn, ZeroMQ and torch's TCPStore do.
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((LOCALHOST, 0))
        yield [s.getsockname()[1] for s in sockets]
