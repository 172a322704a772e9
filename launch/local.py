"""One machine: start the engines, the controller and the trainer ranks, watch them, and end all of them together."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError, DapoError, Preempted, told
from dapo_megatron.observe.catalog import PHASES
from dapo_megatron.observe.display import ProgressDisplay
from dapo_megatron.observe.report import write_report
from dapo_megatron.process import Reporter, read_statuses
from dapo_megatron.run_folder import RunFolder
from launch.commands import Command, command_of_controller, command_of_engine, command_of_rank
from launch.environment import shared_environment
from launch.failures import failed, failure, hang
from launch.heartbeats import Heartbeats
from launch.job import Job, Resume, prepare_new, prepare_resume
from launch.lock import locked
from launch.machine import raise_open_files_limit, this_machine
from launch.network import require_interface
from launch.port_map import ports_needed
from launch.ports import reserved_ports
from launch.processes import Child, ProcessGroup, interruptible
from launch.stopped import Stopped
from launch.topology import Placement, place, split

POLL_S = 0.25
LOOK_S = 1.0
"""Between two looks for processes that hang."""
LAST_WORDS_S = 1.5
"""After a first failure, for what fails with it to say why."""


def run_local(config: RunConfig, *, resume: Resume | None = None, weights: Path | None = None) -> Path:
    """Run a whole job on this machine; returns the path of its report.

    Args:
        resume: which checkpoint of the run folder to go on from; None begins a new run.
        weights: checkpoint whose weights a new run begins with.

    Raises:
        DapoError: the run folder is taken (or empty, with resume), its checkpoint is damaged, or a process died or
            hangs; names its log.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    folder = RunFolder(Path(config.run_dir))
    if resume is not None and not folder.config.exists():
        # Nothing is made where there is nothing to go on from.
        raise ConfigError(f"{folder.path} holds no run: start it without --resume")
    with reserved_ports(ports_needed(config.engine.replicas, config.actor.pipeline_model_parallel_size)) as ports:
        placement = _place(config, ports)
        _make_folder(folder)
        with interruptible() as check_interrupt, locked(folder.lock):
            if resume is None:
                job = prepare_new(config, folder, weights)
            else:
                job = prepare_resume(config, folder, resume)
            try:
                _run(config, folder, job, placement, check_interrupt)
            except (DapoError, OSError, KeyboardInterrupt) as e:
                _end(folder, e)
                raise
            Reporter(folder, "launcher").ended(None, "")
            return write_report(folder)


def _place(config: RunConfig, ports: list[int]) -> Placement:
    if config.launch.interface is not None:
        require_interface(config.launch.interface)
    return place(config, *split([this_machine()], config.launch.engine_nodes), ports)


def _run(
    config: RunConfig, folder: RunFolder, job: Job, placement: Placement, check_interrupt: Callable[[], None]
) -> None:
    raise_open_files_limit()
    with ProcessGroup(folder.logs) as group:
        trainer = _start(config, folder, group, job, placement)
        with ProgressDisplay(folder, config.trainer.steps) as display:
            try:
                _watch(config, folder, group, trainer, display, check_interrupt)
            except KeyboardInterrupt:
                _finish_step(config, folder, group, trainer)
                raise


def _end(folder: RunFolder, error: DapoError | OSError | KeyboardInterrupt) -> None:
    """Leave an exit record and a report, where the disk lets us: what ended the run is what must be told."""
    told_by = Preempted("stopped by a signal") if isinstance(error, KeyboardInterrupt) else told(error)
    kind, message = (told_by.kind, str(told_by)) if told_by is not None else ("crash", str(error))
    Reporter(folder, "launcher").ended(kind, message)
    with contextlib.suppress(OSError, DapoError):
        write_report(folder)


def _make_folder(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"run_dir={folder.path} is a file, or lies in one: choose another run_dir=...") from None


def _start(config: RunConfig, folder: RunFolder, group: ProcessGroup, job: Job, placement: Placement) -> list[Child]:
    """Start everything; returns the trainer ranks."""
    shared = shared_environment(config, os.environ, cpu=placement.cpu, interface=config.launch.interface)
    for engine in placement.engines:
        # An SGLang server waits five seconds after SIGTERM, and has nothing to lose.
        _start_one(group, command_of_engine(config, folder, engine, shared), grace=False)
    _start_one(group, command_of_controller(job, placement, shared))
    return [_start_one(group, command_of_rank(job, placement, place.rank, shared)) for place in placement.ranks]


def _start_one(group: ProcessGroup, command: Command, *, grace: bool = True) -> Child:
    return group.start(command.name, command.arguments, command.environment, grace=grace)


def _finish_step(config: RunConfig, folder: RunFolder, group: ProcessGroup, trainer: list[Child]) -> None:
    """Ask for the end of the step in progress and a checkpoint, and wait for it as long as a stop may take.

    Before the first step there is nothing to save, and nothing is waited for.
    """
    if not any(status.process == "trainer-0" and status.phase in PHASES for status in read_statuses(folder)):
        return
    folder.stop_request.touch()
    end = time.monotonic() + config.launch.stop_grace_s
    while any(c.process.poll() is None for c in trainer) and not failed(folder, group.children):
        if time.monotonic() > end:
            return
        time.sleep(POLL_S)


def _watch(
    config: RunConfig,
    folder: RunFolder,
    group: ProcessGroup,
    trainer: list[Child],
    display: ProgressDisplay,
    check_interrupt: Callable[[], None],
) -> None:
    """Until every trainer rank has ended well.

    Raises:
        DapoError: a process died first, or gives no sign of life.
    """
    heartbeats, stopped = Heartbeats(config.heartbeat_timeout_s), Stopped(group, config.heartbeat_timeout_s)
    looked = 0.0
    while any(c.process.poll() != 0 for c in trainer):
        check_interrupt()
        display.poll()
        # The controller leaves first when the trainer says goodbye.
        if failed(folder, group.children):
            time.sleep(LAST_WORDS_S)
            raise failure(folder, group.children)
        if (now := time.monotonic()) - looked >= LOOK_S:
            looked = now
            running = {c.name for c in group.children if c.process.poll() is None}
            if silent := heartbeats.silent([s for s in read_statuses(folder) if s.process in running], now):
                raise hang(*silent[0])
            stopped.check(now)
        time.sleep(POLL_S)
    display.poll()
