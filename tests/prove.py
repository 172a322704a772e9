"""Proof that a refactoring changes no number: what two revisions compute, compared bit for bit.

    python -m tests.prove REVISION     # records here and in a checkout of REVISION, then compares
    python -m tests.prove --record FILE

A record holds, for every layout, the metrics, gradients and weights of one update on fixed data; and of a short run of
three steps (one engine, one request at a time, fixed seeds) all metrics but times, the ledger, the sampled responses
and the last checkpoint's tensors. Floats are compared by their shortest exact decimal, tensors by the hash of their
bytes. Times and speeds are left out: they are never the same.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.distributed.harness import run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed import test_layouts
from tests.launch.conftest import finish, recipe, start
from tests.tiny import hf_folder

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.weights.exporter import export_stage

ONE_BY_ONE = {
    "rollout": {"concurrency": 1, "temperature": 0.9},
    "engine": {"max_running_requests": 1, "extra_args": ["--disable-radix-cache"]},
    "trainer": {"steps": 3},
    "checkpoint": {"every": 3},
}
NEVER_THE_SAME = ("time", "time/", "speed/", "sync/seconds", "checkpoint/")


def digest(tensor) -> str:
    """Hash of type, shape and bytes."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + raw).hexdigest()[:16]


def one_update(config, batch):
    """Metrics, weights and gradients of one update on this rank."""
    actor, shard = test_layouts.actor_and_shard(config, batch)
    old = [actor.own_column(m, m.rollout_logprobs) for m in shard]
    metrics = actor.update(shard, PolicyObjective(config.algorithm), old)
    weights = {name: digest(tensor) for name, tensor in export_stage(actor.modules, actor.shape)}
    found = {name: digest(torch.from_numpy(array)) for name, array in test_layouts.gradients(actor).items()}
    return metrics, weights, found


def record_layouts(folder: Path) -> dict:
    """{layout: one update} for every layout of the tests."""
    models = {kind: hf_folder(folder / kind, kind, tied=True, layers=4, seed=3) for kind in ("qwen3", "qwen3_moe")}
    out = {}
    for layout, actor in test_layouts.LAYOUTS.items():
        path = models["qwen3_moe" if test_layouts.EP in actor else "qwen3"]
        config = test_layouts.config_for(path, layout, "many", "group_token")
        results = run_ranks(config.world_size, one_update, config, test_layouts.many()[0])
        weights = {name: text for _, found, _ in results for name, text in found.items()}
        gradients = {name: text for _, _, found in results for name, text in found.items()}
        out[layout] = {"metrics": results[0][0], "weights": weights, "gradients": gradients}
        print(layout, flush=True)
    return out


def record_run(folder: Path) -> dict:
    """What a short deterministic run leaves in its folder."""
    code, output, _ = finish(start(recipe(folder, **ONE_BY_ONE)))
    if code:
        raise SystemExit(output)
    run = folder / "run"

    def lines(name):
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    metrics = [{k: v for k, v in row.items() if not k.startswith(NEVER_THE_SAME)} for row in lines("metrics.jsonl")]
    return {
        "metrics": {str(row["step"]): row for row in metrics},
        "ledger": lines("ledger.jsonl"),
        "samples": lines("samples.jsonl"),
        "checkpoint": checkpoint_tensors(run / "checkpoints" / "step_000003" / "model"),
    }


def checkpoint_tensors(path: Path) -> dict[str, str]:
    """{name: digest} of every tensor of a distributed checkpoint."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, checkpoint_id=path, no_dist=True)
    return {name: digest(tensor) for name, tensor in tensors.items()}


def record(path: Path) -> None:
    """Write the record of the tree that this file is in."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"layouts": record_layouts(Path(folder)), "run": record_run(Path(folder))}
    path.write_text(json.dumps(found, indent=1, sort_keys=True))


def differences(before, after, place: str = "") -> list[str]:
    """Every leaf that is not the same, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        rows = []
        for key in sorted(before.keys() | after.keys()):
            if key not in before or key not in after:
                rows.append(f"{place}/{key}: only {'before' if key in before else 'after'}")
            else:
                rows += differences(before[key], after[key], f"{place}/{key}")
        return rows
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [row for i, pair in pairs for row in differences(*pair, f"{place}/{i}")]
    return [] if before == after else [f"{place}: {before!r} before, {after!r} after"]


def leaves(tree) -> int:
    """Values compared."""
    if isinstance(tree, dict | list):
        return sum(map(leaves, tree.values() if isinstance(tree, dict) else tree))
    return 1


def against(revision: str) -> int:
    """Record both trees, print what differs; 1 if anything does."""
    with tempfile.TemporaryDirectory() as folder:
        tree, before, after = Path(folder) / "tree", Path(folder) / "before.json", Path(folder) / "after.json"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], check=True)
        try:
            for place, out in ((tree, before), (Path.cwd(), after)):
                print(f"recording {place}", flush=True)
                environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-m", "tests.prove", "--record", out]
                subprocess.run(command, cwd=place, env=environment, check=True, timeout=1800)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)
        one, other = json.loads(before.read_text()), json.loads(after.read_text())
    rows = differences(one, other)
    print("\n".join(rows) or f"{revision} and this tree: {leaves(one)} values, all the same bit for bit")
    return int(bool(rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", help="what to compare this tree with")
    parser.add_argument("--record", type=Path, help="only write this tree's record")
    args = parser.parse_args()
    if args.record:
        record(args.record)
        return 0
    if not args.revision:
        parser.error("name a revision, such as HEAD~1")
    return against(args.revision)


if __name__ == "__main__":
    sys.exit(main())
