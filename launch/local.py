"""One machine: start the engines, the controller and the trainer ranks, watch them, and end all of them together."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import yaml

from dapo_megatron.checkpoint.store import latest
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import DapoError
from dapo_megatron.observe.progress import ProgressDisplay
from dapo_megatron.observe.report import write_report
from launch.engine import engine_command, engine_environment
from launch.ports import LOCALHOST, reserved_ports
from launch.processes import Child, ProcessGroup, interruptible

POLL_S = 0.25


def run_local(config: RunConfig, *, resume: bool) -> Path:
    """Run a whole job on this machine; returns the path of its report.

    Raises:
        DapoError: the run folder is taken (or empty, with resume), or a process died; names its log and shows its end.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    run_dir = Path(config.run_dir)
    _prepare(config, run_dir, resume)
    try:
        with (
            interruptible(),
            reserved_ports(config.engine.replicas + 1) as ports,
            ProcessGroup(run_dir / "logs") as group,
        ):
            trainer = _start(config, run_dir, group, ports, resume)
            with ProgressDisplay(run_dir, config.trainer.steps) as display:
                _watch(group, trainer, display)
    finally:
        if (run_dir / "metrics.jsonl").exists():
            write_report(run_dir)
    return run_dir / "report.html"


def _prepare(config: RunConfig, run_dir: Path, resume: bool) -> None:
    if resume:
        latest(run_dir)
    elif (run_dir / "metrics.jsonl").exists():
        raise DapoError(f"{run_dir} holds a run already: go on with --resume, or choose another run_dir=...")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))


def _start(config: RunConfig, run_dir: Path, group: ProcessGroup, ports: list[int], resume: bool) -> Child:
    cpu = not torch.cuda.is_available()
    environment = dict(os.environ)
    if cpu:
        environment["OMP_NUM_THREADS"] = "1"
    link_port, *engine_ports = ports
    urls = [f"http://{LOCALHOST}:{port}" for port in engine_ports]
    for i, port in enumerate(engine_ports):
        command = engine_command(config, LOCALHOST, port, cpu=cpu)
        # An SGLang server waits five seconds after SIGTERM, and has nothing to lose.
        group.start(f"engine-{i}", command, engine_environment(environment, cpu=cpu), grace=False)
    shared = ["--config", str(run_dir / "config.yaml"), "--link", f"tcp://{LOCALHOST}:{link_port}", "--engines", *urls]
    group.start("controller", [sys.executable, "-m", "dapo_megatron.rollout", *shared], environment)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run",
        "--standalone", "--nproc-per-node", str(config.world_size),
        "-m", "dapo_megatron.trainer",
    ]  # fmt: skip
    return group.start("trainer", torchrun + shared + (["--resume"] if resume else []), environment)


def _watch(group: ProcessGroup, trainer: Child, display: ProgressDisplay) -> None:
    """Until the trainer ends well.

    Raises:
        DapoError: a process died first.
    """
    while trainer.process.poll() != 0:
        display.poll()
        # The controller leaves first when the trainer says goodbye; an engine never leaves by itself.
        failed = [c for c in group.exited() if c.process.returncode != 0 or c.name.startswith("engine")]
        if failed:
            raise DapoError(_obituary(_culprit(failed)))
        time.sleep(POLL_S)
    display.poll()


def _culprit(failed: list[Child]) -> Child:
    """A killed process takes others with it: one that said why comes first, then the first that was started."""
    return next((c for c in failed if _reason(c)), failed[0])


def _reason(child: Child) -> str | None:
    return next((line for line in reversed(child.tail(200).splitlines()) if line.startswith("error: ")), None)


def _obituary(child: Child) -> str:
    code = child.process.returncode
    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    if (reason := _reason(child)) is not None:
        return f"the {child.name} stopped: {reason.removeprefix('error: ')} (log: {child.log})"
    return f"the {child.name} {how}; the end of {child.log}:\n{child.tail()}"
