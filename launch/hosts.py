"""Which hosts of a job are gone: SLURM says so, or nobody there has answered for a while.

SLURM waits SlurmdTimeout (minutes) before it calls a node down; whether a node's slurmd can be reached is known in
seconds. A thread looks, so that the launcher never waits for a host that does not answer.
"""

import re
import socket
import threading
import time
from collections.abc import Sequence

from dapo_megatron.errors import DapoError
from launch.slurm_calls import slurm

LOOK_S = 5.0
CONNECT_S = 3.0
SILENT_S = 20.0
"""Without an answer, after which a host is taken for lost."""


class HostWatch:
    """Looks at some hosts until it is closed."""

    def __init__(self, hosts: Sequence[str]):
        self._hosts = list(hosts)
        self._lost: list[str] = []
        self._closed = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def lost(self) -> list[str]:
        """Hosts that are gone, each told once."""
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Look no longer."""
        self._closed.set()

    def _look(self) -> None:
        answered = dict.fromkeys(self._hosts, time.monotonic())
        while answered and not self._closed.wait(LOOK_S):
            try:
                known = nodes_of(slurm("scontrol", "--oneliner", "show", "node", ",".join(answered)))
            except DapoError:  # slurmctld may be away for a while: the nodes answer for themselves
                known = {}
            for host in list(answered):
                node = known.get(host)
                if node is not None and node.is_down:
                    gone = True
                else:
                    if reaches(host, node.port if node else 6818):
                        answered[host] = time.monotonic()
                    gone = time.monotonic() - answered[host] > SILENT_S
                if gone:
                    del answered[host]
                    self._lost = [*self._lost, host]


class NodeState:
    """What SLURM says of a node."""

    def __init__(self, line: str):
        state = re.search(r"\bState=(\S+)", line)
        port = re.search(r"\bPort=(\d+)", line)
        self.is_down = state is not None and "DOWN" in state[1].split("+")[0]
        self.port = int(port[1]) if port else 6818


def nodes_of(shown: str) -> dict[str, NodeState]:
    """{name: state} from `scontrol --oneliner show node`. Pure."""
    found = {}
    for line in shown.splitlines():
        if (name := re.match(r"NodeName=(\S+)", line)) is not None:
            found[name[1]] = NodeState(line)
    return found


def reaches(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S):
            return True
    except OSError:
        return False
