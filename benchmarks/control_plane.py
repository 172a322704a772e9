"""What a step of the paper's size costs the controller, and a trainer rank that receives its part of it.

    python -m benchmarks.control_plane               # 512 groups of 16: 41 M tokens, and 168 M under a memory limit
    python -m benchmarks.control_plane --groups 64   # an eighth of it

A controller in a process of its own serves a batch of synthetic responses (log-normal lengths; then all as long as they
may be) by its own code and over the real link. Eight clients, one for each data-parallel replica, fetch their parts at
once (`PartFetcher`); then one of them fetches everything, which is what rank 0 would do if it scattered the batch.
Seconds of the controller are CPU time of its process, threads, encryption and sending included. Ids, log-probs, masks
count as the arrays; the process may take three times their size beside what it took without them, and SLACK for stacks.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

import numpy as np
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.packing import pack_shard
from dapo_megatron.batching.wire import decode_part
from dapo_megatron.config import RunConfig
from dapo_megatron.keys import Keys, make_keys
from dapo_megatron.messages import Batch, Goodbye, Hello, NextBatch, Welcome
from dapo_megatron.process import Reporter
from dapo_megatron.records import Prompt, Response, ScoredGroup, VersionSpan
from dapo_megatron.rollout.controller import Controller
from dapo_megatron.rollout.producer import Producer, Progress, StepGroups
from dapo_megatron.rpc import RpcClient, RpcServer
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer.replica_batch import PartFetcher
from launch.demo import write_model
from launch.ports import reserved_ports

SIZE, REPLICAS, PROMPT, LONGEST, MEAN = 16, 8, 200, 20_480, 5_000
VOCAB = 151_936
MEMORY = 3
"""Most memory beside what the process takes without a batch, in sizes of the arrays."""
SLACK = 256 << 20
TICK_S = 0.005
DEADLINE_S = 300.0


def main() -> int:
    """Print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control_plane",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--groups", type=int, default=512)
    args = parser.parse_args()
    found = [measure(args.groups, lengths) for lengths in (log_normal(args.groups), longest(args.groups))]
    return print_table(found, args.groups / 512)


def log_normal(groups: int) -> np.ndarray:
    """[groups, SIZE] response lengths of mean MEAN."""
    drawn = np.random.default_rng(0).lognormal(0.0, 0.8, (groups, SIZE))
    lengths = drawn
    for _ in range(20):
        lengths = np.clip(lengths * (MEAN / lengths.mean()), 16, LONGEST)
    return lengths.astype(np.int64)


def longest(groups: int) -> np.ndarray:
    """The same, all as long as they may be."""
    return np.full((groups, SIZE), LONGEST)


def measure(groups: int, lengths: np.ndarray) -> dict[str, float]:
    """Serve one batch and fetch it, twice."""
    with tempfile.TemporaryDirectory() as place, reserved_ports(1) as (port,):
        folder, address, keys = Path(place), f"tcp://127.0.0.1:{port}", make_keys()
        config = config_of(folder, groups)
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=serve, args=(config, folder, address, keys, lengths, there), daemon=True)
        process.start()
        try:
            found = fetch(config, address, keys)
            if not here.poll(DEADLINE_S):
                raise SystemExit("the controller did not end")
            found |= here.recv()
        finally:
            process.join(5)
            process.kill()
    tokens = float(lengths.sum() + PROMPT * lengths.size)
    return found | {"tokens": tokens, "sequences": lengths.size, "cpu": found["cpu at 2"] - found["cpu at 1"]}


def config_of(folder: Path, groups: int) -> RunConfig:
    """A run of a tiny model with the paper's batch."""
    write_model(folder / "model")
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "1+2=", "answer": "3"}))
    return RunConfig.model_validate(
        {
            "run_dir": str(folder),
            "model": {"path": str(folder / "model")},
            "data": {"train": str(folder / "train.jsonl"), "template": "plain", "chat": False},
            "rollout": {"prompts_per_step": groups, "group_size": SIZE, "max_response_tokens": LONGEST},
            "trainer": {"mini_batch_prompts": min(32, groups)},
            "actor": {"data_parallel_size": REPLICAS, "micro_batch_tokens": LONGEST + PROMPT},
            "engine": {"context_length": 32_768},
        }
    )


def serve(config: RunConfig, folder: Path, address: str, keys: Keys, lengths: np.ndarray, result: Connection) -> None:
    """The controller's process; sends its figures when it has heard the trainer's goodbye."""
    figures: dict[str, float] = {}
    groups: list[ScoredGroup] = []

    class Ready(Producer):
        """Has generated already."""

        async def step(self, step: int, version: int, progress: Progress) -> StepGroups:
            figures[f"cpu at {step}"] = time.process_time()
            return StepGroups(groups, groups, {}, b"")

    class Synthetic(Controller):
        def _begin(self, snapshot: bytes | None, step: int) -> Welcome:
            welcome = super()._begin(snapshot, step)
            assert self._session is not None
            own = self._session.producer
            self._session.producer = Ready(config, own.buffer, own.make_group, own.ledger)
            return welcome

    async def run(controller: Controller) -> float:
        watch = asyncio.create_task(longest_wait())
        await controller.serve(RpcServer(address, keys))
        await controller.close()
        watch.cancel()
        return await watch

    with Reporter(RunFolder(folder), "controller") as reporter:
        grading = SimpleNamespace(trouble=None)
        sampler = SimpleNamespace(asked_again=0)
        controller = Synthetic(config, reporter, sampler, grading)  # type: ignore[arg-type]  # nobody is asked
        before = memory("VmRSS")
        groups += synthetic_groups(lengths)
        figures["arrays"] = arrays = sum(
            a.nbytes for g in groups for r in g.responses for a in (r.token_ids, r.loss_mask, r.rollout_logprobs)
        )
        limit = memory("VmData") + (MEMORY - 1) * arrays + SLACK
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        gc.freeze()  # as the controller's process does
        figures["blocked"] = asyncio.run(run(controller))
    figures["peak"] = memory("VmHWM") - before
    result.send(figures)


async def longest_wait() -> float:
    """Seconds that the event loop was away at most, until cancelled.

    Others may have its core: a wait counts by the time that its thread was not ready to run, and at most by the CPU
    time that the process spent meanwhile.
    """
    most = 0.0
    try:
        while True:
            began, delayed, spent = time.monotonic(), delay_s(), time.process_time()
            await asyncio.sleep(TICK_S)
            away = time.monotonic() - began - TICK_S - (delay_s() - delayed)
            most = max(most, min(away, time.process_time() - spent))
    except asyncio.CancelledError:
        return most


def delay_s() -> float:
    """Seconds for which this thread was ready to run and did not."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def synthetic_groups(lengths: np.ndarray) -> list[ScoredGroup]:
    """Groups with responses of these lengths."""
    rng = np.random.default_rng(1)

    def response(order: int, sample: int, n: int) -> Response:
        return Response(
            f"p{order}",
            sample,
            rng.integers(0, VOCAB, n, dtype=np.int32),
            np.ones(n, np.bool_),
            -rng.random(n, dtype=np.float32),
            [VersionSpan(0, 0, n)],
            "stop",
            "",
            verdict="right" if sample % 2 else "wrong",
            advantage=(-1.0) ** sample,
        )

    return [
        ScoredGroup(
            order,
            Prompt(f"p{order}", rng.integers(0, VOCAB, PROMPT).tolist(), "3", "", order),
            [response(order, sample, n) for sample, n in enumerate(row)],
        )
        for order, row in enumerate(lengths.tolist())
    ]


def memory(name: str) -> int:
    """Bytes of this process, by its name in /proc."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def fetch(config: RunConfig, address: str, keys: Keys) -> dict[str, float]:
    """The trainer's side: what it takes to fetch the batch, and to hold, decode and pack an eighth of it."""
    rpc = RpcClient(address, keys)
    rpc.ask(Hello(0), deadline_s=DEADLINE_S)
    found: dict[str, float] = {}

    began = time.monotonic()
    parts = next_batch(rpc, 1)
    found["built"] = time.monotonic() - began
    fetchers = [PartFetcher(RpcClient(address, keys), DEADLINE_S) for _ in range(REPLICAS)]
    time.sleep(1.0)  # they are connected
    began = time.monotonic()
    coming = [f.begin(1, r, [update[r] for update in parts]) for r, f in enumerate(fetchers)]
    payloads = [[data for update in replica for data in update.result()] for replica in coming]
    found["fetched at once"] = time.monotonic() - began
    found["bytes"] = float(sum(len(data) for replica in payloads for data in replica))
    found["longest message"] = float(max(len(data) for replica in payloads for data in replica))
    own = payloads[0]
    del coming, payloads

    began = time.process_time()
    shards = [decode_part(data)[1] for data in own]
    found["decoded"] = time.process_time() - began
    samples = [s for shard in shards for micro_batch in shard for s in micro_batch]
    found["held"] = float(sum(np.asarray(a).nbytes for s in samples for a in (s.token_ids, s.loss_mask, s.logprobs)))
    found["own tokens"] = float(sum(s.length for s in samples))
    began = time.process_time()
    for shard in shards:
        pack_shard(shard, packing_rules(config))
    found["packed"] = time.process_time() - began

    parts = next_batch(rpc, 2)
    began = time.monotonic()
    for replica in range(REPLICAS):
        for update in fetchers[0].begin(2, replica, [update[replica] for update in parts]):
            update.result()
    found["fetched by one"] = time.monotonic() - began
    rpc.ask(Goodbye(), deadline_s=DEADLINE_S)
    for fetcher in fetchers:
        fetcher.close()
    rpc.close()
    return found


def next_batch(rpc: RpcClient, step: int) -> list[list[int]]:
    """[update][replica]: parts to fetch."""
    batch = rpc.ask(NextBatch(step, 0), deadline_s=DEADLINE_S)
    assert isinstance(batch, Batch)
    return batch.parts


def print_table(found: list[dict[str, float]], share: float) -> int:
    """The figures beside the targets, which are for `share` of the paper's groups; 1 if one of them is missed."""
    missed = 0

    def row(name: str, value: Callable[[dict[str, float]], float], unit: str, limits: Sequence[float | None]) -> None:
        nonlocal missed
        cells = [name]
        for figures, limit in zip(found, limits, strict=True):
            got = value(figures)
            is_missed = limit is not None and got > limit
            missed += is_missed
            target = "" if limit is None else f" ({'MISSED: ' if is_missed else ''}at most {limit:.3g})"
            cells.append(f"{got:.3g} {unit}{target}")
        table.add_row(*cells)

    titles = [f"{f['tokens'] / 1e6:.1f} M tokens" for f in found]
    table = Table("", *titles, title=f"a step of {found[0]['sequences']:.0f} responses, {REPLICAS} replicas")
    row("bytes a token on the wire", lambda f: f["bytes"] / f["tokens"], "", [12, 12])
    row("longest message", lambda f: f["longest message"] / 2**20, "MiB", [2048, 2048])
    row("controller: build, encode, encrypt, send, of one core", lambda f: f["cpu"], "s", [6 * share, None])
    row("controller: the event loop is away at most", lambda f: f["blocked"] * 1e3, "ms", [100, 100])
    row("controller: peak memory, of the arrays'", lambda f: f["peak"] / f["arrays"], "x", [MEMORY, MEMORY])
    row("until the batch is built", lambda f: f["built"], "s", [None, None])
    row("until all replicas have fetched theirs, at once", lambda f: f["fetched at once"], "s", [None, None])
    row("until one rank has fetched all, to scatter it", lambda f: f["fetched by one"], "s", [None, None])
    row("a rank: decodes its eighth", lambda f: f["decoded"], "s", [share, None])
    row("a rank: packs its eighth", lambda f: f["packed"], "s", [None, None])
    row("a rank: holds, bytes a token", lambda f: f["held"] / f["own tokens"], "", [None, None])
    Console(width=140).print(table)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
