"""What a job of a cluster runs: this code, the configuration and the batch script, kept in the run folder for it.

The launcher goes on from there, and so does everything it starts: whoever changes the code while a job waits or runs
changes nothing of it. The job's comment in SLURM names the snapshot, so that a requeued job finds what it began with,
whatever has become of the recipe; who submits the script again gets the code and the recipe as they are then. Of a
user's own code, the modules and packages that the config names come too.

    snapshots/job_<number>/   code/   config.yaml   script.sh   and later requeues.json (launch/requeue.py)
"""

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import yaml

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from launch.slurm_calls import slurm

HOME = Path(__file__).parents[1]
PACKAGES = ("dapo_megatron", "launch")
NOTE = "snapshot of dapo_megatron:"
"""In a job's comment, before the snapshot's path."""


def is_in(snapshot: Path) -> bool:
    """Whether this process runs the snapshot's code."""
    return Path(__file__).is_relative_to(snapshot)


def take_snapshot(config: RunConfig, snapshot: Path, job: int) -> None:
    """Make a job's snapshot, all at once, unless it is there; the caller holds the run's lock.

    Raises:
        DapoError: SLURM does not give the batch script.
    """
    if snapshot.exists():
        return
    aside = snapshot.with_name(f".{snapshot.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for source in [*(HOME / package for package in PACKAGES), *user_code(config)]:
        _copy(source, aside / "code" / source.name)
    (aside / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    slurm("scontrol", "write", "batch_script", str(job), str(aside / "script.sh"))
    os.replace(aside, snapshot)


def remember(snapshot: Path, job: int) -> None:
    """Note the snapshot in the job's comment, behind what the user has there.

    Raises:
        DapoError: SLURM refuses.
    """
    users = _comment(job).partition(NOTE)[0].strip()
    slurm("scontrol", "update", f"JobId={job}", f"Comment={users} {NOTE} {snapshot}")


def remembered(job: int) -> Path | None:
    """The snapshot that a job began with; None: it begins.

    Raises:
        ConfigError: it is gone.
    """
    _, note, name = _comment(job).partition(NOTE)
    if not note:
        return None
    snapshot = Path(name.strip())
    if not snapshot.is_dir():
        raise ConfigError(
            f"{snapshot}, which job {job} began with, is gone: cancel the job, and submit its script again"
        )
    return snapshot


def _comment(job: int) -> str:
    found = re.search(r"^ +Comment=(.*)$", slurm("scontrol", "show", "job", str(job)), re.MULTILINE)
    return found[1] if found else ""


def user_code(config: RunConfig) -> list[Path]:
    """The modules (files) and packages (folders) that a config names and that are neither ours nor installed."""
    named = [config.rollout.function, *filter(None, [config.grading.grader])]
    found = []
    for name in sorted({reference.partition(":")[0].partition(".")[0] for reference in named} - set(PACKAGES)):
        spec = importlib.util.find_spec(name) if name else None
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue  # a name that cannot be imported is told of by whoever needs it
        source = Path(spec.origin)
        if not any(source.is_relative_to(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")):
            found.append(source.parent if spec.submodule_search_locations else source)
    return found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def environment_in(snapshot: Path, base: Mapping[str, str], working: Path) -> dict[str, str]:
    """An environment in which Python finds the snapshot's code first. Pure.

    Args:
        working: folder in which the job was started, where a user's own modules may be.
    """
    path = [str(snapshot / "code"), *base.get("PYTHONPATH", "").split(os.pathsep), str(working)]
    # `python -m` would put the working folder before all of them.
    return {**base, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}


def go_on_in(snapshot: Path) -> NoReturn:
    """Become the launcher of the snapshot."""
    command = [sys.executable, "-m", "launch.slurm", "--recipe", str(snapshot / "config.yaml")]
    os.execve(sys.executable, command, environment_in(snapshot, os.environ, Path.cwd()))
