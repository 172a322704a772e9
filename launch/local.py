"""One machine: engines, controller and trainer ranks are children of the launcher, which ends all of them together."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.observe.report import write_report
from dapo_megatron.run_folder import RunFolder
from launch.attempt import asked_by_signals, attempt, raise_end
from launch.attempts import open_logs
from launch.commands import Command
from launch.environment import shared_environment
from launch.job import Job, Resume, require_run
from launch.machine import raise_open_files_limit, this_machine
from launch.network import require_interface
from launch.port_map import ports_needed
from launch.ports import reserved_ports
from launch.processes import Child, ProcessGroup
from launch.states import End, Limits, StopAsked
from launch.supervisor import Supervisor
from launch.topology import Placement, place, split


class LocalProcesses:
    """The backend of one machine."""

    def __init__(self, group: ProcessGroup):
        self._group = group

    def start(self, name: str, commands: Sequence[Command], hosts: Sequence[str], *, grace: bool) -> list[Child]:
        """Start a process for each command."""
        return [self._group.start(c.name, c.arguments, c.environment, grace=grace) for c in commands]

    def end(self, children: Sequence[Child]) -> None:
        """End them."""
        self._group.end(children)

    def lost_hosts(self, *, look: bool) -> Sequence[str]:
        """None: the launcher would be gone too."""
        return ()


def run_local(config: RunConfig, *, resume: Resume | None = None, weights: Path | None = None) -> Path:
    """Run a whole job on this machine; returns the path of its report.

    Args:
        resume: which checkpoint of the run folder to go on from; None begins a new run.
        weights: checkpoint whose weights a new run begins with.

    Raises:
        DapoError: the run folder is taken (or empty, with resume), its checkpoint is damaged, or a process died or
            hangs, too often to start it again; names its log.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    folder = RunFolder(Path(config.run_dir))
    if resume is not None:
        require_run(folder)  # nothing is made where there is nothing to go on from
    with placed(config) as placement:
        with attempt(config, folder, resume, weights) as job:
            _run(config, folder, job, placement)
        return write_report(folder)


@contextmanager
def placed(config: RunConfig) -> Iterator[Placement]:
    """Where every process of a run goes on this machine; inside the block nothing else gets their ports.

    Raises:
        ConfigError: the machine has not what the run needs, or an option is not for one machine.
    """
    if config.launch.container is not None:
        raise ConfigError("launch.container is of SLURM jobs: start this one in a container, or set it to null")
    if config.launch.interface is not None:
        require_interface(config.launch.interface)
    raise_open_files_limit(config.concurrency)
    with reserved_ports(ports_needed(config.engine.replicas, config.actor.pipeline_model_parallel_size)) as ports:
        yield place(config, *split([this_machine()], config.launch.engine_nodes), ports)


def _run(config: RunConfig, folder: RunFolder, job: Job, placement: Placement) -> None:
    stop = StopAsked("a signal", comes_back=False)
    with (
        asked_by_signals({signal.SIGTERM: stop, signal.SIGINT: stop}) as asked,
        ProcessGroup(open_logs(folder)) as group,
    ):
        supervisor = Supervisor(
            config,
            folder,
            job,
            LocalProcesses(group),
            lambda hosts: placement,
            hosts=(placement.controller.node.name,),
            spares=(),
            shared=shared_environment(config, os.environ, cpu=placement.cpu, interface=config.launch.interface),
            limits=Limits(config.launch.max_restarts),
        )
        end = supervisor.run(asked)
    assert isinstance(end, End)  # nobody can put this machine back into a queue
    if end.kind == "preempted":
        raise KeyboardInterrupt
    raise_end(end)
