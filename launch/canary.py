"""Whether all nodes of a job see its run folder, asked before anything is started: one task a node, which answers.

A node that sees another folder, or an old state of it, would fail later and say something else.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.errors import ConfigError, DapoError
from launch.allocation import Allocation, Group

ANSWER_S = 120.0
"""For Python to start on every node, from a slow file system."""
APPEAR_S = 60.0
"""For a file to be seen on another node: NFS keeps what it has read for up to a minute."""
LOOK_S = 0.2


@dataclass(frozen=True)
class Unfit:
    """Nodes on which the job cannot run."""

    nodes: tuple[str, ...]
    error: DapoError
    """What is wrong there: a ConfigError where they do not see the folder."""


def unfit_nodes(allocation: Allocation, folder: Path, environment: Mapping[str, str]) -> Unfit | None:
    """Let every node read what is written here, and write what is read here; those that do not, and why."""
    token = folder / f".canary-{secrets.token_hex(8)}"
    token.write_text(token.name)
    try:
        return _asked(allocation, token, environment)
    finally:
        for path in folder.glob(f"{token.name}*"):
            path.unlink(missing_ok=True)


def _asked(allocation: Allocation, token: Path, environment: Mapping[str, str]) -> Unfit | None:
    answers: dict[str, str] = {}
    said = ""
    for i, group in enumerate(allocation.groups):
        done = _ask(group, i if allocation.is_heterogeneous else None, token, environment)
        answers |= read_answers(done.stdout)
        said = said or " ".join(done.stderr.split())[-300:]
    nodes = [node.name for node in allocation.nodes]
    if silent := [node for node in nodes if node not in answers]:
        what = f"no answer from {', '.join(silent)} within {ANSWER_S:.0f} s of asking ({said}): exclude them"
        return Unfit(tuple(silent), DapoError(what))
    if blind := {node: answer for node, answer in answers.items() if answer != "sees it"}:
        told = "; ".join(f"{node}: {answer}" for node, answer in blind.items())
        what = f"run_dir={token.parent} is not the same folder on every node ({told}): choose one that is"
        return Unfit(tuple(blind), ConfigError(what))
    if unseen := _not_appearing([token.with_name(f"{token.name}.{node}") for node in nodes]):
        names = tuple(path.name.removeprefix(f"{token.name}.") for path in unseen)
        what = (
            f"what {', '.join(names)} wrote into run_dir={token.parent} is not seen here after {APPEAR_S:.0f} s: "
            "choose a folder that all nodes share"
        )
        return Unfit(names, ConfigError(what))
    return None


def _ask(
    group: Group, het_group: int | None, token: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    command = [
        "srun",
        *([] if het_group is None else [f"--het-group={het_group}"]),
        f"--nodes={len(group.nodes)}",
        f"--ntasks={len(group.nodes)}",
        "--ntasks-per-node=1",
        "--export=ALL",
        "--overlap",
        "--overcommit",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=0",
        f"--time={max(1, round(ANSWER_S / 60))}",
        sys.executable,
        "-m",
        "launch.canary",
        str(token),
    ]
    try:
        return subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired as e:
        printed = [(p.decode() if isinstance(p, bytes) else p) or "" for p in (e.stdout, e.stderr)]
        return subprocess.CompletedProcess(command, -1, printed[0], printed[1])


def read_answers(printed: str) -> dict[str, str]:
    """{node: answer} from what the tasks print. Pure."""
    rows = [line.split("\t") for line in printed.splitlines()]
    return {row[1]: row[2] for row in rows if row[0] == "canary" and len(row) == 3}


def _not_appearing(paths: Sequence[Path]) -> list[Path]:
    end = time.monotonic() + APPEAR_S
    while missing := [path for path in paths if path.name not in os.listdir(path.parent)]:
        if time.monotonic() > end:
            break
        time.sleep(LOOK_S)
    return missing


def main() -> None:
    """One node's answer."""
    token, node = Path(sys.argv[1]), os.environ["SLURMD_NODENAME"]
    try:
        seen = token.read_text()
        token.with_name(f"{token.name}.{node}").write_text("")
    except OSError as e:
        answer = f"{e.strerror}: {e.filename}"
    else:
        answer = "sees it" if seen == token.name else "sees another file there"
    print("canary", node, answer, sep="\t", flush=True)


if __name__ == "__main__":
    main()
