"""Which process runs on which node, with which devices, cores and ports: a function of nodes and configuration. Pure.

Engines and trainer have nodes of their own, or the same ones, whose devices are then split, never shared.

- An engine replica never spans nodes. Replicas and ranks fill their nodes in order; nodes that nobody needs are spare.
- A tensor-parallel group of trainer ranks lies inside one node, unless no node of the trainer has so many GPUs.
- On shared nodes whoever needs more GPUs inside one node comes first: where sizes are powers of two, every group then
  begins at a multiple of its size, and none is refused that would fit.
- The controller runs on the node of trainer rank 0: they end and begin again together.
- A GPU brings its share of its node's cores; the controller counts as one more GPU for that. Where no node has a GPU,
  processes have no devices, spread evenly over their nodes, and share the cores.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.config import ActorConfig, EngineConfig, RunConfig
from dapo_megatron.errors import ConfigError
from launch.port_map import PortMap


@dataclass(frozen=True)
class Node:
    """A machine, or the part of it that the job was given."""

    name: str
    address: str
    """Under which the other nodes reach its servers."""
    gpus: int
    """That a process of the job sees there, numbered from 0."""
    cpus: int
    """Cores."""
    memory_gib: float | None = None
    """Of its host memory; None: not known."""


@dataclass(frozen=True)
class Place:
    """Where one process runs."""

    node: Node
    devices: tuple[int, ...]
    """Of the GPUs that the job sees on the node; none where no node has any."""
    cpus: int
    """Cores that are its own; 0: it shares the node's with others."""


@dataclass(frozen=True)
class EnginePlace(Place):
    """An SGLang server."""

    replica: int
    port: int
    """HTTP."""
    nccl_port: int
    """--nccl-port: where its own processes meet."""

    @property
    def name(self) -> str:
        """Of the process."""
        return f"engine-{self.replica}"

    @property
    def url(self) -> str:
        """Under which controller and trainer reach it."""
        return f"http://{self.node.address}:{self.port}"


@dataclass(frozen=True)
class RankPlace(Place):
    """A trainer rank; it has one device or none."""

    rank: int
    local_rank: int
    """Among the ranks of its node."""
    local_world: int
    """Ranks of its node."""


@dataclass(frozen=True)
class ControllerPlace(Place):
    """The controller; it has no device."""

    port: int

    @property
    def link(self) -> str:
        """ZeroMQ address, to bind and to connect to."""
        return f"tcp://{self.node.address}:{self.port}"


@dataclass(frozen=True)
class Placement:
    """The whole job."""

    engines: tuple[EnginePlace, ...]
    ranks: tuple[RankPlace, ...]
    controller: ControllerPlace
    meeting_port: int
    """MASTER_PORT; the address is that of rank 0's node."""
    push_ports: tuple[int, ...]
    """Where the senders meet the engines: of each pipeline stage's first weight group, of the second ones, ..."""

    @property
    def cpu(self) -> bool:
        """Whether no process has a device."""
        return not self.engines[0].devices

    @property
    def nodes(self) -> list[Node]:
        """On which anything runs, those of the trainer first."""
        return list(dict.fromkeys(place.node for place in (*self.ranks, *self.engines)))

    @property
    def urls(self) -> list[str]:
        """Of all engines, in order."""
        return [engine.url for engine in self.engines]


def split(nodes: Sequence[Node], engine_nodes: int | None) -> tuple[Sequence[Node], Sequence[Node]]:
    """(nodes of the trainer, nodes of the engines): the last `engine_nodes` are the engines'; None: all are both's.

    Raises:
        ConfigError: none is left for the trainer.
    """
    if engine_nodes is None:
        return nodes, nodes
    if engine_nodes >= len(nodes):
        raise ConfigError(
            f"launch.engine_nodes={engine_nodes} leaves no node for the trainer, there are {len(nodes)}: lower it, ask "
            "for more nodes, or set it to null (engines and trainer then share nodes)"
        )
    return nodes[:-engine_nodes], nodes[-engine_nodes:]


def sides(groups: Sequence[Sequence[Node]], engine_nodes: int | None) -> tuple[Sequence[Node], Sequence[Node]]:
    """(nodes of the trainer, nodes of the engines) of a plain job's one group, or a heterogeneous one's two.

    Raises:
        ConfigError: there are more groups, or no node is left for the trainer.
    """
    if len(groups) == 1:
        return split(groups[0], engine_nodes)
    if len(groups) != 2:
        raise ConfigError(f"a heterogeneous job has 2 groups, trainer and engines; this one has {len(groups)}")
    return groups[0], groups[1]


def place(config: RunConfig, trainer: Sequence[Node], engines: Sequence[Node], ports: Sequence[int]) -> Placement:
    """Place every process of a job. The same nodes give the same places, whoever else has failed meanwhile.

    Args:
        trainer, engines: their nodes, in order; a node may be in both.
        ports: that the job may use on every node (launch/port_map.py).

    Raises:
        ConfigError: too few nodes, GPUs or ports: what is needed and what is there.
    """
    stages = config.actor.pipeline_model_parallel_size
    free = _free([*trainer, *engines])
    of_ranks, of_engines = _trainer_demand(config.actor, trainer), _engine_demand(config.engine, engines)
    if of_ranks.size >= of_engines.size:
        rank_blocks = _take(of_ranks, free)
        engine_blocks = _take(of_engines, free)
    else:
        engine_blocks = _take(of_engines, free)
        rank_blocks = _take(of_ranks, free)
    head = rank_blocks[0][0]
    port_map = PortMap(ports)
    port_map.require(max(Counter(node.name for node, _ in engine_blocks).values()), stages)
    return Placement(
        engines=_engines(engine_blocks, port_map, head),
        ranks=_ranks(rank_blocks, of_ranks.size, head),
        controller=ControllerPlace(head, (), _cores(head, 1, head), port_map.link),
        meeting_port=port_map.meeting,
        push_ports=port_map.pushes(stages),
    )


def place_ranks(actor: ActorConfig, nodes: Sequence[Node]) -> tuple[RankPlace, ...]:
    """Trainer ranks alone, without engines and controller.

    Raises:
        ConfigError: too few nodes or GPUs.
    """
    demand = _trainer_demand(actor, nodes)
    return _ranks(_take(demand, _free(nodes)), demand.size, None)


def place_engines(engine: EngineConfig, nodes: Sequence[Node], ports: Sequence[int]) -> tuple[EnginePlace, ...]:
    """Engines alone, without trainer and controller.

    Raises:
        ConfigError: too few nodes, GPUs or ports.
    """
    blocks, port_map = _take(_engine_demand(engine, nodes), _free(nodes)), PortMap(ports)
    port_map.require(max(Counter(node.name for node, _ in blocks).values()), 0)
    return _engines(blocks, port_map, nodes[0])


_Block = tuple[Node, tuple[int, ...]]
"""A node, and some of its devices."""
_Free = dict[str, list[int]]
"""Devices that nobody has yet, of every node by its name."""


@dataclass(frozen=True)
class _Demand:
    """`count` blocks of `size` GPUs, each inside one of `nodes`."""

    what: str
    count: int
    size: int
    nodes: Sequence[Node]


def _engine_demand(engine: EngineConfig, nodes: Sequence[Node]) -> _Demand:
    size, most = engine.tensor_parallel_size, max((node.gpus for node in nodes), default=0)
    if 0 < most < size:
        raise ConfigError(
            f"engine.tensor_parallel_size={size} needs {size} GPUs inside one node, {named(nodes)} has {most}: an "
            "engine never spans nodes, lower it"
        )
    return _Demand(f"engine.replicas={engine.replicas} engines", engine.replicas, size, nodes)


def _trainer_demand(actor: ActorConfig, nodes: Sequence[Node]) -> _Demand:
    size = actor.tensor_model_parallel_size
    if 0 < max((node.gpus for node in nodes), default=0) < size:
        size = 1  # no node holds a whole group
    what = f"{actor.world_size} trainer ranks (TP x PP x CP x DP)"
    return _Demand(what, actor.world_size // size, size, nodes)


def _free(nodes: Sequence[Node]) -> _Free | None:
    """All devices; None where no node has any."""
    return {node.name: list(range(node.gpus)) for node in nodes} if any(node.gpus for node in nodes) else None


def _take(demand: _Demand, free: _Free | None) -> list[_Block]:
    """The demanded blocks, which are then no longer free."""
    nodes, count, size = demand.nodes, demand.count, demand.size
    if not nodes:
        raise ConfigError(f"{demand.what} have no node: ask for more nodes")
    if free is None:
        return [(nodes[i * min(count, len(nodes)) // count], ()) for i in range(count)]
    there = sum(len(free[node.name]) for node in nodes)
    blocks: list[_Block] = []
    for node in nodes:
        devices = free[node.name]
        while len(devices) >= size and len(blocks) < count:
            blocks.append((node, tuple(devices[:size])))
            del devices[:size]
    if len(blocks) < count:
        raise ConfigError(
            f"{demand.what} need {count} times {size} GPUs inside one node, {named(nodes)} has {there} free of "
            f"{sum(node.gpus for node in nodes)}, which is room for {len(blocks)}: ask for more nodes, or lower it"
        )
    return blocks


def _engines(blocks: list[_Block], port_map: PortMap, head: Node) -> tuple[EnginePlace, ...]:
    before: Counter[str] = Counter()
    places = []
    for replica, (node, devices) in enumerate(blocks):
        port, nccl_port = port_map.engine(before[node.name])
        before[node.name] += 1
        places.append(EnginePlace(node, devices, _cores(node, len(devices), head), replica, port, nccl_port))
    return tuple(places)


def _ranks(blocks: list[_Block], size: int, head: Node | None) -> tuple[RankPlace, ...]:
    """`size` ranks a block."""
    ranks = [(node, devices[i : i + 1]) for node, devices in blocks for i in range(size)]
    of_node = Counter(node.name for node, _ in ranks)
    before: Counter[str] = Counter()
    places = []
    for rank, (node, devices) in enumerate(ranks):
        cores = _cores(node, len(devices), head)
        places.append(RankPlace(node, devices, cores, rank, before[node.name], of_node[node.name]))
        before[node.name] += 1
    return tuple(places)


def _cores(node: Node, gpus: int, head: Node | None) -> int:
    """The cores that so many GPUs of a node bring; the node of the controller, `head`, has one GPU more for that."""
    return gpus * (node.cpus // (node.gpus + (node == head))) if node.gpus else 0


def named(nodes: Sequence[Node]) -> str:
    """Nodes behind each other, for people."""
    return nodes[0].name if len(nodes) == 1 else f"{nodes[0].name} .. {nodes[-1].name} ({len(nodes)} nodes)"
