"""The dry run of a cluster's job, on a login node: what it comes to, and what cannot work, before it waits in a queue.

Nothing is started but the engines' Python, where they have one of their own, to ask which NCCL it has, and what reads
the rows as the controller would (dapo_megatron/rollout/dry_run).
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from rich.console import Console

from dapo_megatron.actor.precision import read_machine
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.run_folder import RunFolder
from launch.inputs import check_data, check_image, check_model_files, check_shape
from launch.job import check_new, check_resume
from launch.plan import Cluster, make_plan, refusals
from launch.plan_text import print_plan
from launch.port_map import job_ports
from launch.sbatch import Request, Script, filled, read_script
from launch.time_limit import check_signal, check_time_limit
from launch.topology import Node, place, sides

ASK_NCCL = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else 'none')"
ASK_NCCL_S = 120.0
"""For a Python to import torch from a slow file system."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    gib: float
    capability: tuple[int, int]


GPUS = {
    "a100": Gpu(80, (8, 0)),
    "h100": Gpu(80, (9, 0)),
    "h200": Gpu(141, (9, 0)),
    "b200": Gpu(180, (10, 0)),
}
"""By the types that --gres=gpu:TYPE:8 may name; without one, an h100 is assumed."""


@dataclass(frozen=True)
class Options:
    """The options of a dry run."""

    script: Path | None
    nodes: int | None
    gpus_per_node: int
    cpus_per_node: int
    gpu_memory_gib: float | None
    """None: that of the GPU's kind."""
    host_memory_gib: float | None
    """Of a node; None: not known, only what a script asks for."""
    bandwidth_gbs: float
    tokens_per_second: float | None
    response_tokens: int | None
    shape_only: bool
    """The model folder may hold config.json alone."""
    bash: bool
    """Print the script that would run, and nothing else."""


def dry_run(recipe: Path, overrides: Sequence[str], options: Options, console: Console) -> None:
    """Print the plan; nothing is started.

    Raises:
        DapoError: the reasons why the job cannot work: all but the last are printed, the last is raised.
        typer.Exit: a row of the data, or a user's function, cannot work; it is told already.
    """
    script = _script(recipe, overrides, options)
    groups, set_by_script = script.groups, script.overrides
    if options.bash:
        console.print(
            _script_text(recipe, overrides, groups, options), markup=False, highlight=False, soft_wrap=True, end=""
        )
        return
    config = load_config(recipe, [*set_by_script, *overrides])
    gpu = _gpu(groups, options.gpu_memory_gib)
    machine = replace(read_machine(), capability=gpu.capability if any(g.gpus for g in groups) else None)
    shape = check_shape(config, machine)
    checks: list[Callable[[], object]] = [
        lambda: check_data(config),
        lambda: check_image(config),
        lambda: check_run_folder(config),
        lambda: check_nccl(config, groups),
        lambda: check_time_limit(config.launch, script.limit_s),
        lambda: check_signal(config.launch, script.limit_s, script.signal_s),
    ]
    if not options.shape_only:
        checks.append(lambda: check_model_files(config))
    found: list[DapoError] = [error for error in map(_error, checks) if error is not None]
    cluster = Cluster(
        gpu.gib,
        options.bandwidth_gbs,
        options.tokens_per_second,
        options.response_tokens,
    )
    ports = job_ports(config.launch.base_port, 0)
    try:
        placement = place(config, *sides(_nodes(groups, options.host_memory_gib), config.launch.engine_nodes), ports)
    except ConfigError as e:
        raise _last_of([*found, e]) from None
    plan = make_plan(config, shape, placement, cluster)
    print_plan(plan, console)
    found += refusals(plan, shape)
    if found:
        raise _last_of(found)
    if not options.shape_only:
        check_rows(recipe, [*set_by_script, *overrides])
    console.print("dry run: nothing was started")


def _last_of(errors: Sequence[DapoError]) -> DapoError:
    """The one to raise; the others are printed."""
    for error in errors[:-1]:
        print(f"error: {error}", file=sys.stderr)
    return errors[-1]


def check_run_folder(config: RunConfig) -> None:
    """Raise DapoError where a run in the folder cannot be gone on with."""
    folder = RunFolder(Path(config.run_dir))
    if folder.config.exists():
        check_resume(config, folder, "latest")
    else:
        check_new(config, folder, None)


def check_rows(recipe: Path, overrides: Sequence[str]) -> None:
    """Read every row and call a user's functions, in a process of its own, which tells what it finds.

    Raises:
        typer.Exit: with its exit code, where it found a mistake.
    """
    command = [sys.executable, "-W", "ignore", "-m", "dapo_megatron.rollout.dry_run", str(recipe), *overrides]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise typer.Exit(code)


def check_nccl(config: RunConfig, groups: Sequence[Request]) -> None:
    """Raise ConfigError where the engines' Python has another NCCL than a broadcast needs, or cannot be options."""
    if config.engine.python is None or not any(group.gpus for group in groups):
        return
    theirs = _nccl(config.engine.python)
    ours = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "none"
    if ours != theirs and config.resharding.transport == "broadcast":
        raise ConfigError(
            f"engine.python={config.engine.python} has NCCL {theirs}, {sys.executable} has {ours}: a weight push needs "
            "the same on both sides, install the same torch in both, or set resharding.transport=disk"
        )


def _nccl(python: str) -> str:
    try:
        done = subprocess.run([python, "-c", ASK_NCCL], capture_output=True, text=True, timeout=ASK_NCCL_S)
    except OSError as e:
        raise ConfigError(f"engine.python={python} cannot be started: {e.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"engine.python={python} did not import torch within {ASK_NCCL_S:.0f} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"engine.python={python} cannot import torch: {' '.join(last)}")
    return done.stdout.strip()


def _script(recipe: Path, overrides: Sequence[str], options: Options) -> Script:
    """The script that would start the job, or one that asks for the nodes that the options name."""
    if (options.script is None) == (options.nodes is None):
        raise ConfigError("--dry-run needs to know the nodes: give --script slurm/x.sh, or --nodes and --gpus-per-node")
    if options.script is None:
        assert options.nodes is not None
        return Script((Request(options.nodes, options.gpus_per_node, options.cpus_per_node),), str(recipe), ())
    text = _text(options.script)
    script = read_script(text, str(options.script))
    filled(text, overrides, str(options.script))  # or what is planned is not what would run
    if Path(script.recipe).name != recipe.name:
        raise ConfigError(f"{options.script} runs {script.recipe}, not {recipe}: give --recipe {script.recipe}")
    return script


def _text(script: Path) -> str:
    try:
        text = script.read_bytes().decode(errors="replace")  # comments may have any encoding
    except OSError as e:
        raise ConfigError(f"--script {script}: {e.strerror}") from None
    if "\r\n" in text:
        raise ConfigError(
            f"--script {script} has DOS line breaks (\\r\\n), which sbatch refuses: write it with \\n alone"
        )
    return text


def _script_text(recipe: Path, overrides: Sequence[str], groups: Sequence[Request], options: Options) -> str:
    if options.script is not None:
        return filled(_text(options.script), overrides, str(options.script))
    group = groups[0]
    gpus = f"#SBATCH --gpus-per-node={group.gpus}\n" if group.gpus else ""
    head = f"#!/usr/bin/env bash\n#SBATCH --nodes={group.nodes}\n#SBATCH --ntasks-per-node=1\n{gpus}"
    head += f"#SBATCH --cpus-per-task={group.cpus}\n#SBATCH --signal=B:USR1@600\n#SBATCH --requeue\n#SBATCH --no-kill\n"
    run = f'\nexec {shlex.quote(sys.executable)} -m launch.slurm --recipe {shlex.quote(str(recipe))} "$@"\n'
    return filled(head + run, overrides, "the script")


def _nodes(groups: Sequence[Request], memory_gib: float | None) -> list[list[Node]]:
    """Nodes as each group may get them; where it asks for more of their memory than they have, they have that."""
    nodes: list[list[Node]] = []
    for group in groups:
        first = sum(map(len, nodes)) + 1
        names = [f"node{n}" for n in range(first, first + group.nodes)]
        memory = min((gib for gib in (group.memory_gib, memory_gib) if gib is not None), default=None)
        nodes.append([Node(name, name, group.gpus, group.cpus, memory) for name in names])
    return nodes


def _gpu(groups: Sequence[Request], gib: float | None) -> Gpu:
    """The smallest of the kinds that are asked for, with the memory that is given, if it is."""
    kinds = [group.gpu_type.lower() for group in groups if group.gpu_type]
    if gib is None and (unknown := [kind for kind in kinds if kind not in GPUS]):
        raise ConfigError(
            f"the memory of a GPU called {unknown[0]} is not known here, only that of {', '.join(GPUS)}: give "
            "--gpu-memory-gib"
        )
    smallest = min((GPUS[kind] for kind in kinds if kind in GPUS), key=lambda gpu: gpu.gib, default=GPUS["h100"])
    return smallest if gib is None else replace(smallest, gib=gib)


def _error(check: Callable[[], object]) -> DapoError | None:
    try:
        check()
    except DapoError as e:
        return e
    return None
