"""Which port is whose. One job uses the same numbers on every node; `place` hands them out. Pure.

On a cluster a job has PORTS_A_JOB ports from `launch.base_port` on, below the kernel's ephemeral range, from which
connections are given theirs (Linux: 32768 and up). Counted from the job's first port:

    | port              | listens                                         | on the node of     |
    |-------------------|-------------------------------------------------|--------------------|
    | 0                 | controller, for replicas' first ranks: ZeroMQ   | the controller     |
    | 1                 | trainer ranks meet (MASTER_PORT)                | trainer rank 0     |
    | 2 + 2k            | engine, HTTP; k counts the engines of its node  | that engine        |
    | 3 + 2k            | the engine's own processes meet (--nccl-port)   | that engine        |
    | last - (g PP + s) | pushes of pipeline stage s: sender and engines  | the stage's sender |

A group for pushes that is opened anew, after an engine was replaced, takes the next g of WEIGHT_GROUPS: a collective
that hangs may still hold the last one's port.

NCCL's and gloo's data connections take ephemeral ports, which they tell each other. On one machine a job has any ports
that are free (launch/ports.py), in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.errors import ConfigError

EPHEMERAL = 32768
"""The first port that Linux gives to whoever asks for any (net.ipv4.ip_local_port_range)."""
PORTS_A_JOB = 64
WEIGHT_GROUPS = 4


def job_ports(base_port: int, job: int) -> range:
    """The ports of a cluster's job, by its number.

    Jobs share ports only if their numbers differ by a multiple of (32768 - base_port) // 64: 199 for 20000.

    Raises:
        ConfigError: there is no room for one job below the ephemeral range.
    """
    room = (EPHEMERAL - base_port) // PORTS_A_JOB
    if room < 1:
        raise ConfigError(
            f"launch.base_port={base_port} leaves {max(0, EPHEMERAL - base_port)} ports below the ephemeral range "
            f"({EPHEMERAL}), a job takes {PORTS_A_JOB}: lower it"
        )
    first = base_port + job % room * PORTS_A_JOB
    return range(first, first + PORTS_A_JOB)


def ports_needed(engines_a_node: int, stages: int) -> int:
    """Ports of a job with so many engines on its fullest node, and pipeline stages."""
    return 2 + 2 * engines_a_node + WEIGHT_GROUPS * stages


@dataclass(frozen=True)
class PortMap:
    """The table above, over the ports of one job."""

    numbers: Sequence[int]

    @property
    def link(self) -> int:
        """The controller's."""
        return self.numbers[0]

    @property
    def meeting(self) -> int:
        """MASTER_PORT of the trainer ranks."""
        return self.numbers[1]

    def engine(self, k: int) -> tuple[int, int]:
        """(HTTP, --nccl-port) of the k-th engine of a node."""
        return self.numbers[2 + 2 * k], self.numbers[3 + 2 * k]

    def pushes(self, stages: int) -> tuple[int, ...]:
        """Of the pipeline stages' first weight groups, their second ones, ..."""
        return tuple(self.numbers[-1 - i] for i in range(WEIGHT_GROUPS * stages))

    def require(self, engines_a_node: int, stages: int) -> None:
        """Raise ConfigError if there are not enough."""
        needed = ports_needed(engines_a_node, stages)
        if needed > len(self.numbers):
            fits = ports_needed(1, stages) <= len(self.numbers)
            remedy = "spread engine.replicas over more nodes" if fits else "lower actor.pipeline_model_parallel_size"
            raise ConfigError(
                f"{engines_a_node} engines on one node and {stages} pipeline stages need {needed} ports, a job has "
                f"{len(self.numbers)}: {remedy}"
            )
