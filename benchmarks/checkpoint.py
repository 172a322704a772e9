"""How long a save holds training up, and how fast checkpoints are written and verified, beside what the machine can do.

    python -m benchmarks.checkpoint                 # 60 M parameters on two data-parallel ranks, in /tmp
    python -m benchmarks.checkpoint --quick
    python -m benchmarks.checkpoint --folder /scratch --layers 24 --hidden 1536

Rows in pairs: what this program does, and the physical limit measured in the same run on the same bytes (a copy in
memory, a plain write with fsync, a plain read). A save that is not asynchronous is the rival: training waits for all.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.actor import Actor
from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.integrity import check_files, check_hashes
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.checkpoint.store import published
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig, parse_config
from dapo_megatron.data.sampler import SamplerState
from dapo_megatron.data.snapshot import Snapshot, encode_snapshot
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_config import read_model
from launch.ports import reserved_ports

RANKS = 2
SAVES = 3
BLOCK = 16 << 20


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a small model")
    args = parser.parse_args()
    hidden, layers = (128, 4) if args.quick else (args.hidden, args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as place, reserved_ports(1) as (port,):
        model = write_model(Path(place) / "model", hidden, layers)
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(measure, (port, model, Path(place), queue), nprocs=RANKS)
        print_table(queue.get())
    return 0


def write_model(path: Path, hidden: int, layers: int) -> Path:
    """A random Qwen3-shaped model."""
    config = transformers.Qwen3Config(
        vocab_size=32000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).float().save_pretrained(path)
    return path


def config_of(model: Path, place: Path, asynchronous: bool) -> RunConfig:
    """A run of the model on RANKS data-parallel ranks."""
    return parse_config(
        {
            "run_dir": str(place / f"run-{asynchronous}"),
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": "unused"},
            "actor": {"data_parallel_size": RANKS},
            "checkpoint": {"asynchronous": asynchronous},
        },
        "benchmark",
    )


def measure(rank: int, port: int, model: Path, place: Path, queue: "mp.SimpleQueue[dict[str, float]]") -> None:
    """On every rank; rank 0 puts the figures into the queue."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    config = config_of(model, place, asynchronous=True)
    layout = init_parallel(config)
    actor = Actor(config, read_model(str(model)), layout)
    actor.load_hf(str(model))
    figures: dict[str, list[float]] = {}
    for asynchronous in (True, False):
        checkpointer = Checkpointer(config_of(model, place, asynchronous), actor)
        for step in range(1, SAVES + 1):
            state = Snapshot(step, SamplerState(0, 0, step, 99, True), step, 1.0, [], [])
            dist.barrier()
            began = time.monotonic()
            checkpointer.save(TrainState(step, step), encode_snapshot(state), format="dp_reshardable")
            figures.setdefault(f"stall {asynchronous}", []).append(time.monotonic() - began)
            checkpointer.finish()
            figures.setdefault(f"published {asynchronous}", []).append(time.monotonic() - began)
    found = {name: median(values) for name, values in figures.items()}
    path = published(RunFolder(place / "run-True"))[-1]
    own = path / f"model/__{rank}_0.distcp"
    found["bytes"] = float(sum(r.size for r in read_manifest(path).files.values()))
    copy = torch.frombuffer(bytearray(own.read_bytes()), dtype=torch.uint8)
    dist.barrier()
    found["copy"] = seconds(lambda: copy.clone())
    dist.barrier()
    found["write"] = seconds(lambda: plain_write(place / f"plain-{rank}", copy))
    dist.barrier()
    if rank == 0:
        for kind in ("cold", "warm"):
            for name, call in (("read", lambda: plain_read(path)), ("verify", lambda: verify(path))):
                if kind == "cold":
                    drop_caches()
                found[f"{name} {kind}"] = seconds(call)
        queue.put(found)
    dist.barrier()


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def plain_write(path: Path, data: torch.Tensor) -> None:
    """The bytes, through to the disk."""
    with path.open("wb", buffering=0) as file:
        view = memoryview(data.numpy())
        for start in range(0, len(view), BLOCK):
            file.write(view[start : start + BLOCK])
        os.fsync(file.fileno())


def plain_read(path: Path) -> None:
    """All files, one after the other."""
    block = bytearray(BLOCK)
    for file in (p for p in path.rglob("*") if p.is_file()):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def verify(path: Path) -> None:
    """What a load does before it reads anything, by one process."""
    manifest = read_manifest(path)
    check_files(path, manifest)
    check_hashes(path, manifest)


def drop_caches() -> None:
    """So that reads come from the disk, where that is allowed."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3")


def print_table(found: dict[str, float]) -> None:
    """Ours beside the limit."""
    size = found["bytes"]

    def row(name: str, ours: float, limit: float | None, what: str) -> None:
        ratio = "" if limit is None else f"{ours / limit:.2f}"
        table.add_row(name, f"{ours:.2f} s", "" if limit is None else f"{limit:.2f} s", ratio, what)

    table = Table(
        "", "here", "limit", "ratio", "the limit is", title=f"checkpoint of {size / 1e9:.2f} GB, {RANKS} ranks"
    )
    row("training waits, asynchronous", found["stall True"], found["copy"], "a copy of the same bytes in memory")
    row("training waits, otherwise", found["stall False"], found["write"], "a plain write of the same bytes, fsync")
    row("copy to publication, asynchronous", found["published True"], found["write"], "a plain write, fsync")
    row("verifying all hashes, from the disk", found["verify cold"], found["read cold"], "a plain read from the disk")
    row("verifying all hashes, from memory", found["verify warm"], found["read warm"], "a plain read from memory")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
