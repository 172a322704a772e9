"""Bytes per second of a weight push, beside a plain broadcast of the same bytes.

    python -m benchmarks.weight_push              # 0.5 billion parameters, Qwen2.5-0.5B's shape, bfloat16: 1 GB
    python -m benchmarks.weight_push --quick      # 0.1 billion
    python -m benchmarks.weight_push --gbit 10    # with links of 10 Gbit/s between the nodes alone

The trainer is on one node and each engine on one of its own: network namespaces that a bridge links, or all of them on
loopback where this process may not make any. Measured twice: with links of 1 Gbit/s, which then are what a push waits
for, and with links as fast as the kernel copies, where trainer ranks, engines and both ends of every socket share this
machine's cores.

push         what the trainer does after every step, from before the engines pause until they sample again: Megatron
             ranks gather, real SGLang servers receive and load
broadcast    torch.distributed over gloo from a process on the trainer's node to one on each engine's: the same bytes
             in the same buckets, into memory that is there already, until all of them have confirmed the last

Both in turn; medians, after one of each to warm up.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.conversion import write_model
from benchmarks.nodes import Node, can_have_namespaces, linked_nodes, loopback
from benchmarks.workers import Worker, started, take_turn
from dapo_megatron.config import RunConfig, parse_config
from dapo_megatron.engines.command import engine_command, engine_environment
from dapo_megatron.resharding.plan import plan_push
from dapo_megatron.weights.hf_config import read_model
from launch.environment import interface_environment, shared_environment
from launch.ports import reserved_ports
from launch.processes import ProcessGroup

TARGET = 0.8
"""Of the broadcast's bytes per second."""
PUSHES, SLOW_PUSHES = 5, 3
"""Where the kernel's copying is the limit, which is noisy, and where a link is."""
ENGINES = 2
GBIT = 1.0
"""Of a link that is slow beside this machine's memory, as a cluster's is beside a GPU's."""
LAYOUTS = {"TP 2": {"tensor_model_parallel_size": 2}, "PP 2": {"pipeline_model_parallel_size": 2}}
START_S, TURN_S = 300.0, 120.0


@dataclass(frozen=True)
class Measured:
    """One layout and number of engines; seconds of each push and each broadcast."""

    layout: str
    engines: int
    bytes: int
    pushes: list[float]
    broadcasts: list[float]

    @property
    def ratio(self) -> float:
        """Bytes per second of a push in units of a broadcast's."""
        return median(self.broadcasts) / median(self.pushes)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weight_push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="0.1 billion parameters, three pushes")
    parser.add_argument("--loopback", action="store_true", help="no namespaces")
    parser.add_argument("--gbit", type=float, help=f"Gbit/s of each node's link (default: {GBIT:g}, then no limit)")
    parser.add_argument("--bucket-mib", type=int, default=64, help="resharding.bucket_mib (default: %(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nodes and processes end with this one
    namespaces = not args.loopback and can_have_namespaces()
    if args.gbit and not namespaces:
        raise SystemExit("--gbit needs network namespaces: root, iproute2, and no --loopback")
    links = [args.gbit] if args.gbit else [GBIT, None] if namespaces else [None]
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, "0.1B" if args.quick else "0.5B")
        for gbit in links:
            with linked_nodes(1 + ENGINES, gbit) if namespaces else nullcontext(loopback(1 + ENGINES)) as nodes:
                pushes = PUSHES if gbit is None and not args.quick else SLOW_PUSHES
                rows += print_table(model, nodes, args, pushes, where(namespaces, gbit))
    return int(any(row.ratio < TARGET for row in rows))


def where(namespaces: bool, gbit: float | None) -> str:
    """The nodes, in words."""
    if not namespaces:
        return "on loopback"
    links = "links as fast as the kernel" if gbit is None else f"links of {gbit:g} Gbit/s"
    return f"between namespaces on one machine, {os.cpu_count()} cores, {links}"


def print_table(
    model: Path, nodes: Sequence[Node], args: argparse.Namespace, pushes: int, where: str
) -> list[Measured]:
    """Measure, and print a line each when it is known."""
    out = Table("", "engines", "push s", "GB/s", "broadcast s", "GB/s", "ratio", "target")
    out.title = f"weight push: {'0.1B' if args.quick else '0.5B'}, buckets of {args.bucket_mib} MiB, gloo {where}"
    rows = []
    for row in measure(model, nodes, args.bucket_mib, pushes):
        print(row, flush=True)
        add_row(out, row)
        rows.append(row)
    Console().print(out)
    return rows


def add_row(table: Table, row: Measured) -> None:
    """One row of the table."""
    columns = [f"{row.engines}"]
    for seconds in (median(row.pushes), median(row.broadcasts)):
        columns += [f"{seconds:.2f}", f"{row.bytes / seconds / 1e9:.2f}"]
    table.add_row(row.layout, *columns, f"{row.ratio:.2f}", f"{TARGET}")


def measure(model: Path, nodes: Sequence[Node], bucket_mib: int, pushes: int) -> Iterator[Measured]:
    """Every layout with every number of engines."""
    trainer, *others = nodes
    environment = shared_environment(config_of(model, "TP 2", bucket_mib), os.environ, cpu=True)
    os.environ |= environment
    with ExitStack() as stack:
        *ports, meeting = stack.enter_context(reserved_ports(len(others) + 1))
        group = stack.enter_context(ProcessGroup(model.parent / "logs"))
        urls = []
        for node, port in zip(others, ports, strict=True):
            command = engine_command(config_of(model, "TP 2", bucket_mib), node.address, port, cpu=True)
            engine = engine_environment(environment | interface_environment(node.interface), cpu=True)
            group.start(f"engine-{port}", node.command(*command), engine, grace=False)
            urls.append(f"http://{node.address}:{port}")
        address = f"tcp://{trainer.address}:{meeting}"
        peers = [
            stack.enter_context(started(f"broadcast rank {r}", broadcast_when_told, node, address, r, len(nodes)))
            for r, node in enumerate(nodes)
        ]
        for layout in LAYOUTS:
            yield from measure_layout(config_of(model, layout, bucket_mib), layout, trainer, urls, peers, pushes)


def measure_layout(
    config: RunConfig, layout: str, node: Node, urls: list[str], peers: list[Worker], pushes: int
) -> Iterator[Measured]:
    """A trainer of one layout with every number of engines."""
    from benchmarks.push_trainer import push_when_told  # megatron-core is for the trainer's processes alone

    types = {"dtype": config.model.dtype, "engine_dtype": config.engine_dtype}
    shape, size = read_model(config.model.path), config.resharding.bucket_mib << 20
    plan = plan_push(shape, config.actor, config.engine, **types, bucket_bytes=size)
    buckets = [bucket.bytes for stage in plan.stages for bucket in stage.buckets]
    with reserved_ports(1) as (port,), ExitStack() as stack:
        ranks = [
            stack.enter_context(started(f"trainer rank {r}", push_when_told, node, config, port, r))
            for r in range(config.world_size)
        ]
        for each in ranks:
            each.answer(START_S)
        for engines in range(1, ENGINES + 1):
            found = Measured(layout, engines, plan.bytes, [], [])
            for number in range(pushes + 1):
                pushed = take_turn(ranks, urls[:engines], START_S if number == 0 else TURN_S)
                plain = take_turn(peers, (engines, buckets), TURN_S)
                if pushed["sync/bytes"] != plan.bytes:
                    raise SystemExit(f"the push sent {pushed['sync/bytes']:.0f} bytes, the plan has {plan.bytes}")
                if number:
                    found.pushes.append(pushed["sync/seconds"])
                    found.broadcasts.append(plain)
            yield found


def config_of(model: Path, layout: str, bucket_mib: int) -> RunConfig:
    """Of a trainer and an engine."""
    return parse_config(
        {
            "run_dir": str(model.parent / "run"),
            "model": {"path": str(model), "dtype": "bfloat16"},
            "data": {"train": "unused", "max_prompt_tokens": 64},
            "rollout": {"max_response_tokens": 256},
            "algorithm": {"overlong_cache": 8},
            "actor": LAYOUTS[layout],
            "engine": {"start_timeout_s": START_S, "mem_fraction": 0.9}
            | {"context_length": 512, "max_total_tokens": 1024, "max_running_requests": 8},
            "trainer": {"collective_timeout_s": TURN_S},
            "resharding": {"bucket_mib": bucket_mib},
        },
        "benchmark",
    )


def broadcast_when_told(pipe: Connection, meeting: str, rank: int, world: int) -> None:
    """A rank of the plain broadcasts: each message is the number of receivers and the sizes of the buckets."""
    limit = timedelta(seconds=START_S)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=limit)
    groups = [dist.new_group(list(range(1 + receivers))) for receivers in range(world)]
    flat = torch.empty(0, dtype=torch.uint8)
    while message := pipe.recv():
        receivers, buckets = message
        if flat.numel() < max(buckets):
            flat = torch.ones(max(buckets), dtype=torch.uint8)
        began = time.monotonic()
        if rank <= receivers:
            for size in buckets:
                dist.broadcast(flat[:size], src=0, group=groups[receivers])
            dist.barrier(groups[receivers])
        pipe.send(time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
