"""The processes of a job as steps of a SLURM allocation: one srun each for controller, trainer ranks and every engine,
and one for a deputy of the launcher on another node (launch/deputy.py).

An srun is a child of the launcher, and is as long there as its step. Its tasks become the processes (launch/task.py),
each with a log that its node writes itself. A step is ended by scancel: an srun that is killed leaves its tasks.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from dapo_megatron.config.launch import ContainerConfig
from dapo_megatron.errors import DapoError
from dapo_megatron.run_folder import RunFolder
from launch.allocation import Allocation
from launch.commands import Command
from launch.container import in_container
from launch.deputy import deputy_command, next_host
from launch.hosts import HostWatch
from launch.processes import Child, ProcessGroup
from launch.slurm_calls import slurm
from launch.task import Task, write_step

END_S = 30.0
"""For a step to end after SIGKILL: SLURM's own time for that, and more."""


class Steps:
    """The backend of a SLURM job."""

    def __init__(
        self,
        group: ProcessGroup,
        folder: RunFolder,
        allocation: Allocation,
        base: Mapping[str, str],
        towards: str | None,
        container: ContainerConfig | None,
    ):
        """
        Args:
            base: environment of the batch script, which every step gets.
            towards: address towards which every node chooses its network interface; None: `base` names it.
        """
        self._group, self._folder, self._allocation = group, folder, allocation
        self._base, self._towards, self._container = base, towards, container
        self._watch = HostWatch([node.name for node in allocation.nodes])
        self._unfit: set[str] = set()
        self._deputy: Child | None = None
        self._deputy_host = ""

    def start(self, name: str, commands: Sequence[Command], hosts: Sequence[str], *, grace: bool) -> list[Child]:
        """Start one step."""
        return self._start(name, commands, hosts, grace=grace, container=self._container)

    def _start(
        self,
        name: str,
        commands: Sequence[Command],
        hosts: Sequence[str],
        *,
        grace: bool,
        container: ContainerConfig | None,
    ) -> list[Child]:
        path = self._folder.step(name)
        write_step(path, [self._task(command) for command in commands])
        processes = tuple(command.name for command in commands)
        log = str(self._group.log_dir / (f"{name}-%t.log" if processes != (name,) else f"{name}.log"))
        has_gpus = any(node.gpus for node in self._allocation.nodes)
        options, task = in_container(
            container,
            [sys.executable, "-m", "launch.task", str(path)],
            [os.getcwd(), str(self._folder.path)],
            gpus=has_gpus,
        )
        command = step_command(self._allocation, name, hosts, log, [*options, *task])
        environment = {**self._base, "SLURM_HOSTFILE": str(self._host_file(name, hosts))}
        return [self._group.start(name, command, environment, grace=grace, processes=processes)]

    def end(self, children: Sequence[Child]) -> None:
        """SIGTERM to the steps that have a grace period, then SIGKILL to what is left of all of them.

        Raises:
            DapoError: a step does not end.
        """
        steps = self._ids()
        self._signal([steps[c.name] for c in children if c.grace and c.name in steps], "TERM")
        _wait(children, self._group.grace_s if any(c.grace for c in children) else 0)
        self._signal([step for name, step in self._ids().items() if name in {c.name for c in children}], "KILL")
        if running := _wait(children, END_S):
            # On a host that is gone, SLURM waits for it; nothing runs there.
            for child in running:
                child.process.kill()
                child.process.wait()
        self._group.forget(children)

    def lost_hosts(self, *, look: bool) -> Sequence[str]:
        """Hosts that SLURM calls down, or whose slurmd has not answered for some time."""
        if look:
            self._watch.look_for_down()
        lost = self._watch.lost()
        self._unfit |= set(lost)
        self._keep_a_deputy()
        return lost

    def close(self) -> None:
        """End all steps; where SLURM does not answer, it does so itself when the batch script has ended."""
        self._watch.close()
        with suppress(DapoError):
            self.end(list(self._group.children))

    def _keep_a_deputy(self) -> None:
        if self._deputy is not None and self._deputy.process.poll() is None:
            return
        if self._deputy is not None:
            self._group.forget([self._deputy])
            self._unfit.add(self._deputy_host)  # whatever it died of, not there again
            self._deputy = None
        host = next_host([node.name for node in self._allocation.nodes], self._unfit)
        if host is None:
            return
        command = deputy_command(
            self._folder, self._allocation.job_id, self._allocation.restarts, self._allocation.nodes[0].name
        )
        self._deputy_host = host
        (self._deputy,) = self._start(
            "deputy", [Command("deputy", command, dict(self._base), None)], [host], grace=False, container=None
        )

    def _task(self, command: Command) -> Task:
        own = {k: v for k, v in command.environment.items() if self._base.get(k) != v}
        arguments = list(command.arguments)
        if self._container is not None and arguments[0] == sys.executable:
            arguments[0] = self._container.python
        return Task(arguments, own, None if command.devices is None else list(command.devices), self._towards)

    def _host_file(self, name: str, hosts: Sequence[str]) -> str:
        path = self._folder.step(name).with_suffix(".hosts")
        path.write_text("".join(f"{host}\n" for host in hosts))
        return str(path)

    def _ids(self) -> dict[str, str]:
        """{name: id} of the job's running steps."""
        jobs = ",".join(str(group.job_id) for group in self._allocation.groups)
        shown = slurm("squeue", "--steps", "--noheader", f"--jobs={jobs}", "--format=%i|%j")
        rows = [line.strip().split("|") for line in shown.splitlines() if "|" in line]
        return {name: step for step, name in rows}

    def _signal(self, steps: Sequence[str], signal: str) -> None:
        if steps:
            slurm("scancel", f"--signal={signal}", *steps, check=False)  # a step may be gone meanwhile


def step_command(
    allocation: Allocation, name: str, hosts: Sequence[str], log: str, command: Sequence[str]
) -> list[str]:
    """argv of the srun of one step: a task for each entry of `hosts`, in that order. Pure."""
    nodes = list(dict.fromkeys(hosts))
    group = next(i for i, g in enumerate(allocation.groups) if nodes[0] in [node.name for node in g.nodes])
    return [
        "srun",
        f"--job-name={name}",
        *([f"--het-group={group}"] if allocation.is_heterogeneous else []),
        f"--nodes={len(nodes)}",
        f"--ntasks={len(hosts)}",
        "--export=ALL",  # also where the script has #SBATCH --export=NONE
        "--distribution=arbitrary",  # the order of SLURM_HOSTFILE
        "--overlap",  # processes share their nodes; who may use which device is the placement's
        "--overcommit",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=1",
        "--wait=0",
        "--unbuffered",
        f"--output={log}",
        f"--error={log}",
        "--open-mode=append",
        *command,
    ]


def _wait(children: Sequence[Child], seconds: float) -> list[Child]:
    """Those that still run after that time."""
    end = time.monotonic() + seconds
    while (running := [c for c in children if c.process.poll() is None]) and time.monotonic() < end:
        time.sleep(0.1)
    return running
