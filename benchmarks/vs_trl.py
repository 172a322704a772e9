"""This project and TRL's GRPOTrainer (loss_type="dapo") on the same two cores, the same model, data and recipe.

    make bench-trl                                     # both environments, both workloads, ten minutes or more
    python -m benchmarks.vs_trl --quick                # a few steps, to see that it runs
    python -m benchmarks.vs_trl --only long --steps 6  # one workload

What differs, and cannot be made equal. TRL generates with transformers in the training process (with one thread and
with two; the faster run counts); this project has an SGLang server beside two data-parallel ranks (one thread each)
and sends weights to it. TRL has no dynamic sampling, so it is off here too. TRL mixes the responses of all prompts
into every update; this project keeps groups whole. TRL grades between generation and update, which counts as rest;
here grading overlaps with generation. The log-prob comparison after a push (a check, not training) is off.

This project runs twice: generating and training in turn, as TRL does, and with rollout.max_policy_lag=1, where the
engine answers while one rank trains on responses of weights that are a step older. Evaluation is off the clock but
for the run with a lag, where it goes on beside training.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.results import Run, from_metrics, from_trl, summarize, table
from benchmarks.workloads import WAYS, WORKLOADS, Workload, trl_settings
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import DapoError, exit_code
from dapo_megatron.observe.jsonl import read_lines
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
CORES = 2
TRL_THREADS = (1, 2)
"""TRL runs with each number of torch threads, and its faster run is the one that is compared."""
WARM_UP_STEPS = 2
"""First steps that do not count: caches fill and kernels are chosen."""
STOP_S = 30.0


def main() -> int:
    """Prepare, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vs_trl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-trl", help="folder of models, logs and results")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python", help="Python that has TRL")
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="one workload")
    parser.add_argument("--steps", type=int, help="rollout steps, instead of the workload's own number")
    parser.add_argument("--quick", action="store_true", help="4 steps each")
    parser.add_argument("--evaluate-every", type=int, default=5, help="steps between evaluations (off the clock)")
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds for one run of one system")
    parser.add_argument("overrides", nargs="*", help="section.key=value for this project's side")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    return exit_code(lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Run the workloads one after the other and print a table each.

    Raises:
        DapoError: TRL's environment is missing, or a run failed or passed its deadline; names its log.
    """
    if not args.trl_python.exists():
        raise DapoError(f"{args.trl_python} does not exist: `make bench-trl` makes TRL's environment")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    out = args.out / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    console = Console(width=max(120, Console().width))
    for workload in WORKLOADS:
        if args.only not in (None, workload.name):
            continue
        folder = args.out / workload.name
        workload.prepare(folder)
        steps = args.steps or (4 if args.quick else workload.steps)
        every = min(steps, args.evaluate_every)
        ours = []
        for i, (system, layout) in enumerate(WAYS.items()):
            name = f"{workload.name}-{i}"
            extra = [*layout, *args.overrides]
            config = workload.recipe(folder, out / name, steps=steps, evaluate_every=every, extra=extra)
            ours.append(run_ours(config, out, name, system, args.deadline))
        theirs = max(
            (run_trl(config, out, workload, args.deadline, args.trl_python, threads) for threads in TRL_THREADS),
            key=lambda run: summarize(run.rows, WARM_UP_STEPS).tokens_per_second,
        )
        console.print(table(workload.title, ours, theirs, WARM_UP_STEPS, workload.target))
    console.print(f"medians over steps, the first {WARM_UP_STEPS} left out; raw results and logs: {out}")


def run_ours(config: RunConfig, out: Path, name: str, system: str, deadline: float) -> Run:
    """Run this project in processes of its own."""
    recipe = out / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump()))
    command = [sys.executable, "-m", "dapo_megatron.cli", "run", str(recipe)]
    started = run_within(command, out / f"{name}.log", deadline, threads=1)
    return from_metrics(read_metrics(RunFolder(Path(config.run_dir))), system, started)


def run_trl(config: RunConfig, out: Path, workload: Workload, deadline: float, python: Path, threads: int) -> Run:
    """Run TRL in its own environment."""
    name = f"{workload.name}-trl-{threads}"
    rows = out / f"{name}.jsonl"
    job = {
        "threads": threads,
        "settings": trl_settings(config),
        "model": config.model.path,
        "train": config.data.train[0],
        "eval": config.data.eval[0] if config.data.eval else None,
        "evaluate_every": config.evaluation.every,
        "samples": config.evaluation.samples,
        "updates_per_step": config.updates_per_step,
        "warmup_updates": config.warmup_updates,
        "max_response_tokens": config.rollout.max_response_tokens,
        "overlong_cache": config.algorithm.overlong_cache,
        "rows": str(rows),
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(job, indent=1))
    command = [str(python), str(ROOT / "benchmarks/trl_worker.py"), str(path)]
    started = run_within(command, out / f"{name}.log", deadline, threads=threads)
    return from_trl(read_lines(rows), f"TRL, {threads} thread{'s' * (threads > 1)}", started)


def run_within(command: list[str], log: Path, deadline: float, *, threads: int) -> float:
    """Run a command to its end; returns the Unix time of its start.

    Raises:
        DapoError: it failed, or passed the deadline (it is then stopped); names its log.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for each other lose tenfold on a machine with other work
        "HF_HUB_OFFLINE": "1",
    }
    started = time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise DapoError(f"{log.stem} took more than {deadline:.0f} s: see {log}") from None
        finally:
            if process.poll() is None:
                process.terminate()
                _wait_or_kill(process)
    if code:
        raise DapoError(f"{log.stem} ended with exit code {code}: see {log}")
    return started


def _wait_or_kill(process: subprocess.Popen) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
