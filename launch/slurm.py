"""Run a job on the nodes of a SLURM allocation: a batch script ends in `exec python -m launch.slurm --recipe ... "$@"`.

The launcher runs on the first node. Engines, controller and trainer ranks are steps of the job (launch/steps.py). The
last `launch.engine_nodes` nodes of a plain job are the engines'; of a heterogeneous job the first group trains and the
second generates. A run folder that holds a run is gone on with: so does who submits the script again, and a requeue.

    SIGUSR1 (#SBATCH --signal=B:USR1@600), or `launch.save_before_end_s` before the time limit
                    the run saves, and the job goes back into the queue
    SIGTERM         the run saves as long as SLURM lets it; at the time limit the job goes back into the queue; a
                    preempted one is put back by SLURM itself
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    # Its default is to end the process: it waits until somebody hears it, in the snapshot's launcher too. The imports
    # below start threads, and whichever does not block it would take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

import typer
from rich.console import Console

from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.errors import ConfigError, Preempted, exit_code
from dapo_megatron.observe.report import write_report
from dapo_megatron.run_folder import RunFolder
from launch.allocation import Allocation, find_allocation, job_number
from launch.attempt import Asked, asked_by_signals, attempt, make_folder, raise_end
from launch.attempts import open_logs
from launch.canary import unfit_nodes
from launch.dry_run import Options, dry_run
from launch.ending import ending
from launch.environment import VISIBLE, shared_environment
from launch.inputs import check_job_inputs
from launch.job import Job, Resume
from launch.job_snapshot import go_on_in, is_in, remember, remembered, take_snapshot
from launch.journal import Journal
from launch.machine import raise_open_files_limit
from launch.port_map import job_ports
from launch.processes import ProcessGroup
from launch.requeue import failures, requeue
from launch.states import End, GraceOver, Limits, Requeue, StopAsked
from launch.steps import Steps
from launch.supervisor import Supervisor
from launch.time_limit import check_time_limit
from launch.topology import Node, Placement, place, sides

TERMINATED = StopAsked("SIGTERM: the job is cancelled or preempted", comes_back=False)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example:  python -m launch.slurm --recipe launch/recipes/demo.yaml trainer.steps=20")
def main(
    recipe: Annotated[Path, typer.Option(help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as needed")] = None,
    plan: Annotated[
        bool, typer.Option("--dry-run", help="Print what a job comes to and what cannot work; start nothing.")
    ] = False,
    script: Annotated[Path | None, typer.Option(help="Dry run: its #SBATCH lines say which nodes.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Dry run: nodes, where there is no script.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="Dry run, with --nodes.")] = 0,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="Dry run, with --nodes.")] = 64,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=1, help="Dry run: default 80; 141 of an h200.")] = None,
    host_memory_gib: Annotated[
        float | None, typer.Option(min=1, help="Dry run: of a node, where --mem asks for no less.")
    ] = None,
    bandwidth_gbs: Annotated[
        float, typer.Option(min=0.001, help="Dry run: GB/s of a broadcast to all engines.")
    ] = 25.0,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Dry run: response tokens trained in a second, measured.")
    ] = None,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="Dry run: mean length; default: longest.")] = None,
    shape_only: Annotated[bool, typer.Option(help="Dry run: the model folder may hold config.json alone.")] = False,
    bash: Annotated[bool, typer.Option(help="Dry run: print the script that would run, nothing else.")] = False,
) -> None:
    """Run a job on the nodes of this SLURM allocation."""
    if not plan:
        raise typer.Exit(exit_code(lambda: begin(recipe, overrides or [])))
    options = Options(
        script=script,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        gpu_memory_gib=gpu_memory_gib,
        host_memory_gib=host_memory_gib,
        bandwidth_gbs=bandwidth_gbs,
        tokens_per_second=tokens_per_second,
        response_tokens=response_tokens,
        shape_only=shape_only,
        bash=bash,
    )
    raise typer.Exit(exit_code(lambda: dry_run(recipe, overrides or [], options, Console())))


def begin(recipe: Path, overrides: list[str]) -> None:
    """Run one attempt of a job: by the recipe, or if it is not the first one by the snapshot that the first one took.

    Raises:
        DapoError: as run_slurm.
    """
    in_job = bool(os.environ.get("SLURM_JOB_ID"))
    if in_job and (snapshot := remembered(job_number(os.environ))) is not None and not is_in(snapshot):
        go_on_in(snapshot)
    run_slurm(load_config(recipe, overrides))


def run_slurm(config: RunConfig) -> None:
    """Run one attempt of a job.

    Raises:
        DapoError: why it ended, unless it is finished or goes back into the queue.
    """
    allocation = find_allocation(os.environ)
    check_time_limit(config.launch, None if allocation.ends is None else allocation.ends - time.time())
    folder = RunFolder(Path(config.run_dir).resolve())
    make_folder(folder)
    snapshot = folder.snapshot(allocation.job_id)
    if not is_in(snapshot):
        take_snapshot(config, snapshot, allocation.job_id)
        remember(snapshot, allocation.job_id)
        go_on_in(snapshot)
    nodes = {node.name: Node(node.name, address_of(node.name), node.gpus, node.cpus) for node in allocation.nodes}
    groups = [[nodes[node.name] for node in group.nodes] for group in allocation.groups]
    trainers, engines = sides(groups, config.launch.engine_nodes)
    ports = job_ports(config.launch.base_port, allocation.job_id)

    def plan(hosts: tuple[str, ...]) -> Placement:
        """`hosts` are those of the slots: the nodes that are used at first, in their order."""
        at = dict(zip(slots, hosts, strict=True))
        training, serving = ([nodes[at[n.name]] for n in side if n.name in at] for side in (trainers, engines))
        return place(config, training, serving, ports)

    first = place(config, trainers, engines, ports)
    slots = tuple(dict.fromkeys(p.node.name for p in (first.controller, *first.ranks, *first.engines)))
    spares = tuple(name for name in nodes if name not in slots)
    raise_open_files_limit(config.concurrency)
    end: End | Requeue | None = None
    try:
        resume: Resume | None = "latest" if folder.config.exists() else None
        with attempt(config, folder, resume, None, allocation.job_id, check_job_inputs) as job:
            end = _supervised(config, folder, job, allocation, plan, slots, spares)
            if isinstance(end, Requeue):
                raise Preempted(f"back into the queue: {end.why}")
            raise_end(end)
    except (Preempted, KeyboardInterrupt):  # a SIGTERM of the time limit may come while the report is written
        if isinstance(end, Requeue):
            requeue(allocation, folder, end, config.launch.forget_bad_nodes_s)
        raise
    print(f"report: {write_report(folder)}", flush=True)


def _limits(launch: LaunchConfig, allocation: Allocation, folder: RunFolder) -> Limits:
    if not allocation.can_requeue and launch.max_requeues > 0:
        Journal(folder).note(
            f"SLURM does not put job {allocation.job_id} back: --no-requeue was given, or is the cluster's default"
        )
    can_requeue = allocation.can_requeue and launch.max_requeues > 0
    can_fail = failures(folder, allocation.job_id) < launch.max_requeues
    if can_requeue and not can_fail:
        Journal(folder).note(f"launch.max_requeues={launch.max_requeues} is used up: another failure ends the job")
    return Limits(launch.max_restarts, can_requeue=can_requeue, can_fail=can_fail)


def _pools(allocation: Allocation) -> dict[str, tuple[int, int]]:
    """Nodes can replace each other that have as many GPUs, in one group: a step cannot span groups."""
    return {node.name: (i, node.gpus) for i, group in enumerate(allocation.groups) for node in group.nodes}


def _supervised(
    config: RunConfig,
    folder: RunFolder,
    job: Job,
    allocation: Allocation,
    plan: Callable[[tuple[str, ...]], Placement],
    slots: tuple[str, ...],
    spares: tuple[str, ...],
) -> End | Requeue:
    base = {name: value for name, value in os.environ.items() if name != VISIBLE}
    limits = _limits(config.launch, allocation, folder)
    if (unfit := unfit_nodes(allocation, folder.path, base)) is not None:
        # At its first start the job's user is near, and may have chosen a wrong folder.
        if not (allocation.restarts and limits.can_requeue and limits.can_fail):
            raise unfit.error
        Journal(folder).note(f"{unfit.error} -> back into the queue without {', '.join(unfit.nodes)}")
        return Requeue(str(unfit.error), unfit.nodes, is_failure=True)
    placement = plan(slots)
    shared = shared_environment(config, base, cpu=placement.cpu, interface=config.launch.interface)
    towards = None if config.launch.interface is not None else placement.controller.node.address
    signals = {
        signal.SIGUSR1: StopAsked("SIGUSR1: the time limit is near", comes_back=True),
        signal.SIGTERM: TERMINATED,
        signal.SIGINT: StopAsked("a signal", comes_back=False),
    }
    with asked_by_signals(signals) as by_signals, ProcessGroup(open_logs(folder)) as group:
        steps = Steps(group, folder, allocation, base, towards, config.launch.container)
        supervisor = Supervisor(
            config,
            folder,
            job,
            steps,
            plan,
            hosts=slots,
            spares=spares,
            shared=shared,
            pools=_pools(allocation),
            ends=allocation.ends,
            limits=limits,
        )
        try:
            asked = _explained(by_signals, allocation.job_id)
            return supervisor.run(_also_by_clock(asked, allocation.ends, config.launch.save_before_end_s))
        finally:
            steps.close()


def _explained(asked: Asked, job: int) -> Asked:
    """What signals ask for; a SIGTERM of the time limit wants the job back, also while SIGUSR1's save is under way."""

    def look() -> StopAsked | GraceOver | None:
        wish = asked()
        if wish == TERMINATED and ending(job) == "time limit":
            return StopAsked("SIGTERM: the time limit is reached", comes_back=True)
        return wish

    return look


def _also_by_clock(asked: Asked, ends: float | None, before_s: float) -> Asked:
    """Signals, and the time limit: also where nobody sends a signal."""
    told = False

    def look() -> StopAsked | GraceOver | None:
        nonlocal told
        if (wish := asked()) is not None:
            return wish
        if not told and ends is not None and time.time() > ends - before_s:
            told = True
            return StopAsked(f"the time limit is {before_s:.0f} s away", comes_back=True)
        return None

    return look


def address_of(host: str) -> str:
    """IPv4 address under which the other nodes reach a host.

    Raises:
        ConfigError: its name has none, or only one of itself alone.
    """
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except socket.gaierror as e:
        raise ConfigError(
            f"{host} has no address ({e.strerror}): nodes must be found by their names in SLURM"
        ) from None
    if address.startswith("127."):
        raise ConfigError(f"{host} is {address} here, which other nodes cannot reach: mend /etc/hosts")
    return address


if __name__ == "__main__":
    app()
