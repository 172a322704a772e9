"""The demo with a lag while its engines are killed one after the other: is every prompt settled exactly once?

    python -m benchmarks.engine_deaths
    python -m benchmarks.engine_deaths --steps 60 --every 15 --engines 4 rollout.max_policy_lag=4

Every so many seconds the engine that has run longest gets SIGKILL. The launcher starts it again, its requests are asked
of the others, and it serves the live weights when it is back. The run must reach its last step with an exact ledger.
"""

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.chaos import check
from benchmarks.faults import Job
from dapo_megatron.errors import DapoError, exit_code
from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.rollout.ledger import read_ledger
from dapo_megatron.run_folder import RunFolder
from launch.demo import prepare
from launch.recipes import recipe_path

ROOT = Path(__file__).parents[1]
LONGEST_S = 3600.0
GOAL = m.EVAL_ACCURACY


def main() -> int:
    """Run, check, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_deaths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two deaths")
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/engine_deaths", help="run folder")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """The whole benchmark.

    Raises:
        DapoError: the run did not end well, or a prompt was lost or used twice.
    """
    prepare(ROOT / "demo")
    shutil.rmtree(args.out, ignore_errors=True)
    overrides = [
        "rollout.max_policy_lag=2",
        "algorithm.importance_cap=2",
        f"engine.replicas={args.engines}",
        "launch.max_restarts=10000",
        "evaluation.every=1000",
        *args.overrides,
    ]
    job = Job(recipe_path("demo"), RunFolder(args.out), overrides, None)
    began = time.monotonic()
    job.start(f"trainer.steps={args.steps}")
    try:
        job.wait_for_steps(1)
        deaths = kill_engines(job, args.every)
        job.finish(0)
    finally:
        if job.process.poll() is None:
            job.kill_all()
    check(job.folder)
    records, ledger = read_metrics(job.folder)[1:], read_ledger(job.folder.ledger)
    if len(records) != args.steps:
        raise DapoError(f"{job.folder.metrics} has {len(records)} of {args.steps} steps")
    table = Table("", "", title=f"{args.steps} steps at lag {records[-1][m.LAG_MAX]:.0f} and less")
    for name, value in (
        ("engines killed", str(deaths)),
        ("groups in the ledger, each settled exactly once", str(len({entry.order for entry in ledger}))),
        ("seconds", f"{time.monotonic() - began:.0f}"),
        ("held-out accuracy before and after", f"{read_metrics(job.folder)[0][GOAL]:.3f}, {records[-1][GOAL]:.3f}"),
    ):
        table.add_row(name, value)
    Console().print(table)


def kill_engines(job: Job, every_s: float) -> int:
    """SIGKILL to the engine that has run longest, again and again until the run ends; returns how often."""
    deaths, end = 0, time.monotonic() + LONGEST_S
    while time.monotonic() < end:
        due = time.monotonic() + every_s
        while time.monotonic() < due:
            if job.process.poll() is not None:
                return deaths
            time.sleep(0.2)
        if engines := job.members("engine", forks=False):
            min(engines, key=psutil.Process.create_time).kill()
            deaths += 1
    raise DapoError(f"the run did not end within {LONGEST_S:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
