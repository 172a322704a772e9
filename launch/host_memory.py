"""What the processes of each node hold in its own memory, and whether the job gets so much of it. Pure.

Python, its libraries and the files that the kernel keeps in memory are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from math import prod

from dapo_megatron.checkpoint.size import SaveBytes
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from launch.topology import Node, Placement, named

GIB = 2**30
TOKEN_BYTES = 9
"""Of one token of a response in the controller: int32 id, bool mask, float32 log-prob."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes on one node, by part."""

    trainer: int
    """Of its ranks, where they have no GPU."""
    engines: int
    """Likewise."""
    copy: int
    """Of its ranks' shares, while a checkpoint is written."""
    gather: int
    """Of its ranks, while a fully_reshardable one is gathered."""
    responses: int
    """Of a step in the controller, all of them as long as may be; and of the steps that generation may run ahead."""
    graders: int
    """At most."""

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Hosts:
    """Nodes behind each other that hold the same, and of which the job gets as much."""

    nodes: tuple[Node, ...]
    each: HostMemory


def host_memory(
    config: RunConfig, placement: Placement, save: SaveBytes, rank_bytes: Sequence[int], engine_bytes: int
) -> list[Hosts]:
    """Of all nodes that hold anything.

    Args:
        rank_bytes: what a rank of each pipeline stage holds there beside its parts of a save.
        engine_bytes: what an engine holds there.
    """

    def of_node(node: Node) -> HostMemory:
        ranks = [rank.rank for rank in placement.ranks if rank.node == node]
        r, grading, is_head = config.rollout, config.grading, placement.controller.node == node
        tokens = prod((r.prompts_per_step, r.group_size, r.max_response_tokens))
        return HostMemory(
            # Stages are behind each other.
            trainer=sum(rank_bytes[rank * len(rank_bytes) // len(placement.ranks)] for rank in ranks),
            engines=engine_bytes * sum(engine.node == node for engine in placement.engines),
            copy=len(ranks) * save.copy,
            gather=len(ranks) * save.gather,
            responses=is_head * tokens * TOKEN_BYTES * (1 + r.max_policy_lag),
            graders=is_head * (grading.workers * grading.memory_mib << 20),
        )

    def alike(node: Node) -> tuple[HostMemory, float | None]:
        return of_node(node), node.memory_gib

    found = [Hosts(tuple(nodes), each) for (each, _), nodes in groupby(placement.nodes, alike)]
    return [hosts for hosts in found if hosts.each.total]


def check_host_memory(hosts: Hosts) -> None:
    """Raise ConfigError where the job gets less of its nodes' memory than they hold."""
    total, gib = hosts.each.total, hosts.nodes[0].memory_gib
    if gib is None or total <= gib * GIB:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in hosts.each.parts.items() if size)
    raise ConfigError(
        f"{named(hosts.nodes)}: a node needs {total / GIB:.1f} GiB of host memory ({parts}), the job has {gib:g} "
        "there: ask for more (#SBATCH --mem), or spread the processes over more nodes"
    )
