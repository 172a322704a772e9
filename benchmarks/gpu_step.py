"""One update of a model of 1.7 billion parameters on one GPU, in each precision: seconds, tokens/s, utilisation.

    python -m benchmarks.gpu_step                                  # bfloat16 and every FP8 recipe that the GPU has
    python -m benchmarks.gpu_step --precisions off,tensorwise --tokens 65536

Convention: model FLOPs = 6 x parameters x tokens (2 forward, 4 backward; attention's own products and the pass for old
log-probs are not counted, padding is not a token), with tied embeddings counted once. Utilisation is relative to the
GPU's dense bfloat16 peak in every row, FP8 included, so that rows compare. Weights and tokens are random: nothing of
what is timed depends on them.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.precision import RECIPES, check_precision, read_machine
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.packing import pack_shard
from dapo_megatron.compat import prepare_trainer
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import DapoError, exit_code
from dapo_megatron.records import Group, Prompt, Response, VersionSpan
from dapo_megatron.weights.families import FAMILIES, ModelShape
from launch.ports import reserved_ports

QWEN3_1_7B = ModelShape(
    family=FAMILIES["Qwen3ForCausalLM"],
    layers=28,
    hidden=2048,
    ffn=6144,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocab=151936,
    tied=True,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    max_positions=40960,
)

PEAK_BF16_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100-SXM4-80GB": 312.0}
"""Dense bfloat16 by torch's device name, from the vendor's data sheets; others are given by --peak-tflops."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row."""

    precision: str
    parameters: int
    tokens: int
    """In one update, padding excluded."""
    padding: int
    update_s: float
    """Median."""
    logprobs_s: float
    """Median, of the pass for old log-probs."""
    peak_bytes: int
    """Device memory that tensors took at most."""

    def tflops(self) -> float:
        """Model TFLOP/s of the update."""
        return 6 * self.parameters * self.tokens / self.update_s / 1e12


def bench_config(precision: str, micro_batch_tokens: int, sequence: int) -> RunConfig:
    """A bfloat16 run on one rank."""
    return RunConfig.model_validate(
        {
            "model": {"path": "random"},
            "data": {"train": "random", "max_prompt_tokens": sequence},
            "rollout": {"max_response_tokens": sequence},
            "algorithm": {"overlong_cache": 0},
            "engine": {"context_length": 2 * sequence},
            "actor": {"micro_batch_tokens": micro_batch_tokens},
            "precision": {"fp8": precision},
        }
    )


def random_shard(config: RunConfig, shape: ModelShape, tokens: int, sequence: int) -> list[MicroBatch]:
    """Micro-batches of sequences of `sequence` tokens, an eighth of them prompt, `tokens` in all."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(shape.vocab, (n,), generator=generator).tolist()

    prompt_tokens = sequence // 8
    n = sequence - prompt_tokens
    groups = []
    for i in range(max(1, tokens // sequence)):
        prompt = Prompt(id=str(i), input_ids=ids(prompt_tokens), ground_truth="", text="", row=i)
        spans = [VersionSpan(0, 0, n)]
        columns = (np.array(ids(n), np.int32), np.ones(n, np.bool_), np.zeros(n, np.float32))
        response = Response(prompt.id, 0, *columns, spans, "stop", "", advantage=(-1.0) ** i)
        groups.append(Group(i, prompt, [response]))
    rules = packing_rules(config)
    batch = build_step_batch(
        groups,
        step=1,
        version=0,
        seed=0,
        mini_batch_groups=len(groups),
        aggregation="token",
        rules=rules,
    )
    return pack_shard(batch.mini_batches[0].shards[0], rules)


def measure(config: RunConfig, shape: ModelShape, tokens: int, sequence: int, repeats: int) -> Measurement:
    """Time updates and log-prob passes on this rank, after two of each that are not counted."""
    # Here, for prepare_trainer comes before megatron-core.
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.actor.training_objective import PolicyObjective
    from dapo_megatron.distributed.layout import init_parallel

    actor = Actor(config, shape, init_parallel(config))
    shard = random_shard(config, shape, tokens, sequence)
    objective = PolicyObjective(config.algorithm)
    scoring, updates = [], []
    for _ in range(2 + repeats):
        began = _now()
        old = actor.logprobs(shard)
        scored = _now()
        actor.update(shard, objective, old)
        scoring.append(scored - began)
        updates.append(_now() - scored)
    used = sum(mb.real_tokens for mb in shard)
    return Measurement(
        precision=config.precision.fp8,
        parameters=sum(p.numel() for p in actor.modules[0].parameters()),
        tokens=used,
        padding=sum(len(mb.tokens) for mb in shard) - used,
        update_s=statistics.median(updates[2:]),
        logprobs_s=statistics.median(scoring[2:]),
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def table(rows: list[Measurement], device: str, peak_tflops: float) -> Table:
    """One line a precision."""
    first = rows[0]
    out = Table(
        "precision",
        "update s",
        "old log-probs s",
        "tokens/s",
        "model TFLOP/s",
        "utilisation",
        "memory GiB",
        "padding",
        title=f"{device}, {first.parameters / 1e9:.2f} B parameters, {first.tokens} tokens an update; "
        f"FLOPs = 6 x parameters x tokens, peak {peak_tflops:g} TFLOP/s (dense bfloat16)",
    )
    for row in rows:
        out.add_row(
            "bfloat16" if row.precision == "off" else row.precision,
            f"{row.update_s:.3f}",
            f"{row.logprobs_s:.3f}",
            f"{row.tokens / row.update_s:,.0f}",
            f"{row.tflops():.0f}",
            f"{100 * row.tflops() / peak_tflops:.1f} %",
            f"{row.peak_bytes / 2**30:.1f}",
            f"{100 * row.padding / (row.tokens + row.padding):.1f} %",
        )
    return out


def main() -> None:
    """Measure each precision in a process of its own (FP8 state is global) and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default=",".join(["off", *RECIPES]), help="off and recipes, comma-separated")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of one update")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of one sequence")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5, help="updates that are timed")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of this GPU, if it is not known here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise DapoError("benchmarks.gpu_step needs a GPU, and torch finds none")
    if args.one:
        _measure_here(args)
        return
    device = torch.cuda.get_device_name()
    peak = args.peak_tflops or PEAK_BF16_TFLOPS.get(device)
    if peak is None:
        raise DapoError(f"the bfloat16 peak of '{device}' is not known here: give --peak-tflops")
    rows, console = [], Console()
    for precision in args.precisions.split(","):
        try:
            check_precision(bench_config(precision, args.micro_batch_tokens, args.sequence), QWEN3_1_7B, read_machine())
        except DapoError as e:
            console.print(f"left out: {e}", soft_wrap=True)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_step", *sys.argv[1:], "--one", precision]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800, check=False)
        if done.returncode:
            raise DapoError(f"the measurement in precision {precision} failed; its output is above")
        rows.append(Measurement(**json.loads(done.stdout.splitlines()[-1])))
    if not rows:
        raise DapoError(f"none of the precisions {args.precisions} runs on this machine")
    console.print(table(rows, device, peak))


def _measure_here(args: argparse.Namespace) -> None:
    prepare_trainer()
    with reserved_ports(1) as (port,):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        config = bench_config(args.one, args.micro_batch_tokens, args.sequence)
        result = measure(config, QWEN3_1_7B, args.tokens, args.sequence, args.repeats)
        print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
