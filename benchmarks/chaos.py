"""The demo run, killed at random moments and resumed, again and again: is anything lost, doubled or corrupt?

    python -m benchmarks.chaos --minutes 10
    python -m benchmarks.chaos --minutes 60 --seed 3 rollout.max_policy_lag=1

Every life of the run ends with a fault, drawn by chance: SIGKILL of a trainer rank, the controller, an engine or all
processes at a random moment, while a checkpoint is written or published, or during a push; SIGTERM; a full disk (as
root, on a small tmpfs); and, between two lives, a bit flipped in a checkpoint, a file cut short, an older manifest. The
next life begins with --resume. After each, every prompt of the ledger must have been used exactly once, and every
checkpoint must be intact; damage must be refused by name before --resume=latest-intact may go on. At last the run ends
undisturbed, and a run without faults shows what it should have learned.
"""

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.faults import BETWEEN, FAULTS, Fault, Job, small_disk, unmount
from dapo_megatron.checkpoint.integrity import intact_manifest
from dapo_megatron.checkpoint.store import published
from dapo_megatron.errors import DapoError, StorageError, exit_code
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.rollout.ledger import check_exactly_once, read_ledger
from dapo_megatron.run_folder import RunFolder
from launch.demo import prepare
from launch.recipes import recipe_path

ROOT = Path(__file__).parents[1]
DISK_MB = 96
LAST_STEPS = 5
"""Steps of the last life, which nothing disturbs."""
TOLERANCE = 0.12
"""Largest difference of the final accuracies; two undisturbed runs with other seeds differ by half of it."""
GOAL = "eval/accuracy"


def main() -> int:
    """Run, check, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="time for the lives that end with a fault")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/chaos", help="folder of the runs")
    parser.add_argument("--alone", action="store_true", help="without the undisturbed run at the end")
    parser.add_argument("overrides", nargs="*", help="section.key=value for both runs")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the small disk is unmounted
    return exit_code(lambda: chaos(args))


def chaos(args: argparse.Namespace) -> None:
    """The whole benchmark.

    Raises:
        DapoError: something was lost, doubled or corrupt, or the run learned less than it should have.
    """
    prepare(ROOT / "demo")
    unmount(args.out)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    overrides = [
        "checkpoint.every=1",
        "checkpoint.keep_last=3",
        "evaluation.every=1000",
        "launch.max_restarts=0",
        *args.overrides,
    ]
    rng, lived = random.Random(args.seed), list[tuple[Fault, float]]()
    with small_disk(args.out, DISK_MB) as disk:
        job = Job(recipe_path("demo"), RunFolder((disk or args.out) / "disturbed"), overrides, disk)
        kinds = [fault for fault in (*FAULTS, *BETWEEN) if disk is not None or not fault.needs_small_disk]
        if disk is None:
            print("left out, for it takes root: disk full", flush=True)
        faults = rng.sample(kinds, len(kinds))  # each kind once, before chance decides alone
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            fault = faults.pop() if faults else rng.choice(kinds)
            lived.append((fault, live(job, fault, rng)))
            steps = len(read_metrics(job.folder)) - 1
            print(f"{len(lived)}. {fault.name}: at step {steps}, {lived[-1][1]:.0f} s to go on", flush=True)
        steps = read_metrics(job.folder)[-1]["step"] + LAST_STEPS
        job.start(f"trainer.steps={steps:.0f}")
        job.finish(0)
        check(job.folder)
        disturbed = read_metrics(job.folder)[-1][GOAL]
    print_table(lived, steps, disturbed)
    if args.alone:
        return
    plain = Job(recipe_path("demo"), RunFolder(args.out / "undisturbed"), overrides, None)
    plain.start(f"trainer.steps={steps:.0f}")
    plain.finish(0)
    expected = read_metrics(plain.folder)[-1][GOAL]
    print(f"held-out accuracy after {steps:.0f} steps: {disturbed:.3f}, undisturbed {expected:.3f}")
    if disturbed < expected - TOLERANCE:
        raise DapoError(f"the disturbed run learned less: {disturbed:.3f} against {expected:.3f}")


def live(job: Job, fault: Fault, rng: random.Random) -> float:
    """One life and its end; returns the seconds from its start to its first new step.

    Raises:
        DapoError: what came before it was lost, doubled or corrupt, or the fault was not told in one line.
    """
    began = time.monotonic()
    job.start("trainer.steps=100000")
    job.wait_for_steps(1)
    to_go_on = time.monotonic() - began
    if fault in BETWEEN:
        job.wait(lambda: len(published(job.folder)) > 1, "a second checkpoint")  # one of them will be damaged
    code, output = fault.strike(job, rng)
    if fault not in BETWEEN and code != fault.exit_code:
        raise DapoError(f"{fault.name}: exit code {code}, expected {fault.exit_code}:\n{output[-2000:]}")
    if left := job.left():
        raise DapoError(f"{fault.name}: left behind {left}")
    if fault in BETWEEN:
        refused_and_gone_on(job, fault, rng)
    check(job.folder)
    return to_go_on


def refused_and_gone_on(job: Job, fault: Fault, rng: random.Random) -> None:
    """Damage the newest checkpoint: --resume refuses it by name, and what is intact can be gone on from."""
    newest = published(job.folder)[-1]
    fault.damage(newest, rng)
    job.start("trainer.steps=100000")
    output = job.finish(1)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or newest.name not in errors[0] or "--resume=latest-intact" not in errors[0]:
        raise DapoError(f"{fault.name}: not refused in one line that names {newest.name}:\n{output[-2000:]}")
    job.start("trainer.steps=100000", resume="--resume=latest-intact")
    job.wait_for_steps(1)
    job.kill_all()
    for aside in job.folder.checkpoints.glob(".step_*.damaged"):  # kept for a person; in an hour they fill the disk
        shutil.rmtree(aside)


def check(folder: RunFolder) -> None:
    """Every prompt used exactly once; every published checkpoint intact.

    Raises:
        DapoError: names what is not.
    """
    audit = check_exactly_once(read_ledger(folder.ledger))
    if audit.problems:
        raise DapoError(f"{folder.ledger}: {audit.problems[0]}")
    for path in published(folder):
        try:
            intact_manifest(path)
        except StorageError as e:
            raise DapoError(f"a corrupt checkpoint was published: {e}") from None
    steps = [int(record["step"]) for record in read_metrics(folder)]
    if steps != list(range(len(steps))):
        raise DapoError(f"{folder.metrics} has a gap or a repetition: steps {steps}")


def print_table(lived: list[tuple[Fault, float]], steps: float, accuracy: float) -> None:
    """How often each fault struck, and how soon the run went on."""
    table = Table("fault", "times", title=f"{len(lived)} faults, {steps:.0f} steps")
    for name, count in Counter(fault.name for fault, _ in lived).most_common():
        table.add_row(name, str(count))
    Console().print(table)
    seconds = sorted(seconds for _, seconds in lived)
    print(
        f"median {seconds[len(seconds) // 2]:.0f} s from a start to the first new step; every prompt was used exactly "
        f"once, no corrupt checkpoint; held-out accuracy {accuracy:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
