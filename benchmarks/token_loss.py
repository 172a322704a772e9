"""Memory and time of the token loss, forward and backward, beside its peers and its floors.

    python -m benchmarks.token_loss                                        # 2,048 tokens, Qwen2.5-0.5B's output layer
    python -m benchmarks.token_loss --tokens 16384 --hidden 2048 --dtype bfloat16       # on a GPU

Every peer runs in a process of its own on the same tensors: log-probs of given labels, with gradients to the hidden
states and to the output weight. This project's version computes the entropies besides; the others do not.

memory      peak beyond the inputs and their two gradients
matmuls     the products that a loss without logits in memory needs (forward, recompute, two backward) at the machine's
            best rate, that of large products: the floor in time. The full-logits versions need one product less.
bytes       hidden states and weight read three times, both gradients written, at the measured copy rate: the floor
            that would hold if arithmetic were free
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.token_loss import token_logprobs
from dapo_megatron.config import ActorConfig

CHUNK = ActorConfig().loss_chunk_tokens
LARGE = 2048
"""Rows of the products that give the machine's rate."""
MiB = 2**20


def ours(hidden, weight, labels):
    return token_logprobs(hidden, weight, labels, 1.0, CHUNK, dist.group.WORLD)[0]


def full_logits(hidden, weight, labels):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def compiled(hidden, weight, labels):
    return torch.compile(full_logits)(hidden, weight, labels)


def cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def liger(hidden, weight, labels):
    """Liger's fused linear GRPO loss wants whole sequences; one sequence of all tokens, advantage 1, no clipping."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    mask = torch.ones(1, labels.numel(), device=labels.device)
    advantages = torch.ones(1, device=labels.device)
    return loss(hidden[None], weight, labels[None], mask, advantages)[0]


PEERS = {
    "this project": (ours, None),
    "full logits, log_softmax": (full_logits, None),
    "full logits, torch.compile": (compiled, None),
    "liger fused linear GRPO": (liger, "liger_kernel"),
    "cut-cross-entropy": (cut_cross_entropy, "cut_cross_entropy"),
}


def inputs(args):
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, generator=g).to(args.device, kind)
    weight = (torch.randn(args.vocab, args.hidden, generator=g) * args.hidden**-0.5).to(args.device, kind)
    labels = torch.randint(0, args.vocab, (args.tokens,), generator=g).to(args.device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def timed(args, function) -> float:
    """Median seconds of `args.repeat` calls, after one that is not counted."""
    seconds = []
    for _ in range(args.repeat + 1):
        synchronize(args)
        began = time.perf_counter()
        function()
        synchronize(args)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure(args, name: str) -> dict[str, float]:
    """Peak bytes beyond inputs and gradients, and seconds, of one peer in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    hidden, weight, labels = inputs(args)
    function = PEERS[name][0]

    def step(tokens: int = args.tokens):
        hidden.grad = weight.grad = None
        function(hidden[:tokens], weight, labels[:tokens]).sum().backward()

    # Compiling, and the libraries' code that is touched for the first time, are not the loss's memory.
    step() if name == "full logits, torch.compile" else step(8)
    hidden.grad = weight.grad = None
    own = sum(t.numel() * t.element_size() for t in (hidden, weight))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        step()
        peak = resident("VmHWM")
    return {"bytes": peak - before - own, "seconds": timed(args, step)}


def resident(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def floors(args) -> dict[str, float]:
    """Seconds of the products alone, and of moving the bytes that must be moved."""
    hidden, weight, _ = (t.detach() for t in inputs(args))
    rows = hidden[:LARGE]
    logits, grad_hidden, grad_weight = rows @ weight.T, torch.empty_like(rows), torch.empty_like(weight)

    def products():
        for _ in range(2):
            torch.mm(rows, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, rows, out=grad_weight)

    large = torch.empty(256 * MiB, dtype=torch.uint8, device=args.device)
    copy = torch.empty_like(large)
    rate = 2 * large.numel() / timed(args, lambda: copy.copy_(large))
    moved = 4 * (hidden.numel() + weight.numel()) * hidden.element_size()
    return {"matmuls": timed(args, products) * args.tokens / len(rows), "bytes": moved / rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs; the median counts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        result = floors(args) if args.part == "floors" else measure(args, args.part)
        print(json.dumps(result))
        return

    floor = run(args, "floors")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"token loss: {args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, {args.dtype}, {device}"
    table = Table("", "memory MiB", "of full", "seconds", "of the matmuls", title=title)
    results = {name: run(args, name) for name in PEERS}
    full = results["full logits, log_softmax"]["bytes"]
    for name, r in results.items():
        if "skipped" in r:
            table.add_row(name, r["skipped"])
            continue
        share, factor = r["bytes"] / full, r["seconds"] / floor["matmuls"]
        table.add_row(name, f"{r['bytes'] / MiB:.0f}", f"{share:.3f}", f"{r['seconds']:.3f}", f"{factor:.2f}")
    table.add_row("floor: matmuls", "", "", f"{floor['matmuls']:.3f}", "1.00")
    table.add_row("floor: bytes", "", "", f"{floor['bytes']:.3f}", f"{floor['bytes'] / floor['matmuls']:.2f}")
    Console().print(table)


def run(args, part: str) -> dict:
    """One part in a process of its own."""
    package = PEERS[part][1] if part in PEERS else None
    if package is not None:
        if args.device == "cpu":
            return {"skipped": "needs a GPU"}
        if importlib.util.find_spec(package) is None:
            return {"skipped": f"{package} is not installed"}
    options = [f"--{name}={getattr(args, name)}" for name in ("tokens", "hidden", "vocab", "dtype", "device", "repeat")]
    command = [sys.executable, __file__, *options, "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
