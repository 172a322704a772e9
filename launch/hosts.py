"""Which hosts of a job are gone: SLURM says so, or their slurmd has not answered for a while.

SLURM waits SlurmdTimeout (minutes) before it calls a node down; whether a node's slurmd can be reached is known in
seconds. Where the launcher's own host does not answer either (SLURM is being upgraded, say), nothing is concluded. A
thread looks, so that the launcher never waits for a host that does not answer.
"""

import contextlib
import queue
import re
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dapo_megatron.errors import DapoError
from launch.slurm_calls import slurm

LOOK_S = 5.0
CONNECT_S = 3.0
MISSES = 4
"""Looks in a row without an answer, after which a host is taken for lost."""
AT_ONCE = 32
"""Hosts that are asked side by side: one that is gone takes CONNECT_S."""


@dataclass(frozen=True)
class NodeState:
    """What SLURM says of a node."""

    is_down: bool
    port: int | None
    """Of its slurmd, where it is another than the cluster's."""


class HostWatch:
    """Looks at some hosts, of which the first is the launcher's, until it is closed."""

    def __init__(self, hosts: Sequence[str]):
        self._hosts = list(hosts)
        self._misses = dict.fromkeys(hosts, 0)
        """Looks in a row without an answer, of those that are not lost."""
        self._known: dict[str, NodeState] = {}
        self._lock = threading.Lock()
        self._lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def lost(self) -> list[str]:
        """Hosts that are gone, each told once."""
        found = []
        while not self._lost.empty():
            found.append(self._lost.get())
        return found

    def close(self) -> None:
        """Look no longer."""
        self._closed.set()

    def look_for_down(self) -> None:
        """Ask SLURM now which hosts are down."""
        with self._lock:
            try:
                self._known |= nodes_of(
                    slurm("scontrol", "--oneliner", "show", "node", ",".join(self._misses), tries=1)
                )
            except (DapoError, OSError):  # slurmctld may be away for a while: the nodes answer for themselves
                return
            self._tell([host for host in self._misses if host in self._known and self._known[host].is_down])

    def _look(self) -> None:
        port: int | None = None
        with ThreadPoolExecutor(AT_ONCE) as threads:
            while not self._closed.wait(LOOK_S):
                self.look_for_down()
                if port is None:
                    with contextlib.suppress(DapoError, OSError):
                        port = slurmd_port(slurm("scontrol", "show", "config", tries=1))
                hosts = list(self._misses)
                answers = threads.map(self._answers, hosts, [port] * len(hosts))
                self._count({host for host, is_there in zip(hosts, answers, strict=True) if not is_there})

    def _count(self, unreachable: set[str]) -> None:
        with self._lock:
            for host in self._misses:
                is_missing = host in unreachable and self._hosts[0] not in unreachable
                self._misses[host] = self._misses[host] + 1 if is_missing else 0
            self._tell([host for host, misses in self._misses.items() if misses >= MISSES])

    def _tell(self, lost: Sequence[str]) -> None:
        for host in lost:
            del self._misses[host]
            self._lost.put(host)

    def _answers(self, host: str, port: int | None) -> bool:
        node = self._known.get(host)
        at = node.port if node is not None and node.port is not None else port
        return at is None or reaches(host, at)


def nodes_of(shown: str) -> dict[str, NodeState]:
    """{name: state} from `scontrol --oneliner show node`. Pure."""
    found = {}
    for line in shown.splitlines():
        name, state = re.match(r"NodeName=(\S+)", line), re.search(r"\bState=([^\s+]+)", line)
        port = re.search(r"\bPort=(\d+)", line)
        if name is not None and state is not None:
            found[name[1]] = NodeState("DOWN" in state[1], int(port[1]) if port else None)
    return found


def slurmd_port(shown: str) -> int | None:
    """The cluster's, from `scontrol show config`; None where every node has one of a range. Pure."""
    found = re.search(r"^SlurmdPort\s*=\s*(\d+)\s*$", shown, re.MULTILINE)
    return int(found[1]) if found else None


def reaches(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S):
            return True
    except OSError:
        return False
