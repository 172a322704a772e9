"""Prove from a run folder's ledger that no prompt was skipped or used twice.

    python -m tools.check_ledger runs/demo

What waits must be what the newest checkpoint holds. The size of the data set, by which epochs are told apart, is that
checkpoint's, or --prompts.
"""

import argparse
import sys
from pathlib import Path

from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.checkpoint.store import controller_state, published
from dapo_megatron.data.snapshot import decode_snapshot
from dapo_megatron.errors import DataError, exit_code
from dapo_megatron.rollout.ledger import check_exactly_once, check_snapshot, read_ledger
from dapo_megatron.run_folder import RunFolder


def main() -> int:
    """0 where the ledger proves it; else 1, and why on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tools.check_ledger", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompts", type=int, help="prompts in the data set; default: the newest checkpoint knows")
    args = parser.parse_args()
    return exit_code(lambda: check(RunFolder(args.run_dir), args.prompts))


def check(folder: RunFolder, prompts: int | None) -> None:
    """Print what the ledger shows.

    Raises:
        DataError: there is no ledger, or a prompt was lost or used twice.
    """
    if not folder.ledger.exists():
        raise DataError(f"{folder.ledger} does not exist: give the folder of a run")
    entries, differences = read_ledger(folder.ledger), list[str]()
    if checkpoints := published(folder):
        newest = checkpoints[-1]
        snapshot = decode_snapshot(controller_state(newest), read_manifest(newest).step)
        prompts, differences = prompts or snapshot.sampler.size, check_snapshot(entries, snapshot)
    audit = check_exactly_once(entries, prompts)
    epochs = "epochs are not known (no checkpoint, no --prompts)" if prompts is None else f"{audit.epochs} whole epochs"
    print(
        f"{audit.issued} prompts issued: {audit.settled} settled, the first {audit.frontier} of them without a gap; "
        f"{len(audit.waiting)} wait to be used; {epochs}"
    )
    problems = [*audit.problems, *differences]
    for problem in problems[:-1]:
        print(problem, file=sys.stderr)
    if problems:
        raise DataError(f"{problems[-1]}: {folder.ledger} does not prove that every prompt was used once")
    print("no prompt was skipped or used twice")


if __name__ == "__main__":
    sys.exit(main())
