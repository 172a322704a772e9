"""Machines for a benchmark: network namespaces of this one, linked by a bridge; loopback without root or `ip`.

bench-<pid>-0 .. bench-<pid>-N     eth0, 10.78.0.1 .. 10.78.0.N+1, each with a loopback of its own
bench-<pid>-hub                    the bridge
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Node:
    """Where a process runs.

    Attributes:
        namespace: its network namespace; None: this process's own.
        address: by which the others reach it.
        interface: that has this address.
    """

    namespace: str | None
    address: str
    interface: str

    def command(self, *argv: str) -> list[str]:
        """A command line that runs there, from any node."""
        return list(argv) if self.namespace is None else ["ip", "netns", "exec", self.namespace, *argv]

    def enter(self) -> None:
        """Move this process there; before it starts a thread.

        Raises:
            OSError: the kernel refuses.
        """
        if self.namespace is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(Path("/run/netns") / self.namespace, os.O_RDONLY)
        try:
            if libc.setns(handle, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.namespace}")
        finally:
            os.close(handle)


def can_have_namespaces() -> bool:
    """Whether this process may make network namespaces and links between them."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    name = f"bench-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@contextmanager
def linked_nodes(count: int, gbit: float | None = None) -> Iterator[list[Node]]:
    """Nodes in namespaces of their own, which end with the block.

    Args:
        gbit: Gbit/s that each node can send; None leaves it to the kernel.
    """
    hub, names = f"bench-{os.getpid()}-hub", [f"bench-{os.getpid()}-{k}" for k in range(count)]
    made: list[str] = []
    try:
        for name in (hub, *names):
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", hub, "link", "set", "br0", "up")
        for k, name in enumerate(names):
            _ip("-n", hub, "link", "add", f"v{k}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", hub, "link", "set", f"v{k}", "master", "br0", "up")
            _ip("-n", name, "address", "add", f"10.78.0.{k + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            if gbit is not None:
                shaper = ("tbf", "rate", f"{gbit}gbit", "burst", "1mb", "latency", "20ms")
                _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *shaper)
        yield [Node(name, f"10.78.0.{k + 1}", "eth0") for k, name in enumerate(names)]
    finally:
        for name in made:
            _ip("netns", "delete", name)


def loopback(count: int) -> list[Node]:
    """The same machine, under so many names."""
    return [Node(None, "127.0.0.1", "lo")] * count


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
