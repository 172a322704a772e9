"""What SLURM gave this job: its nodes with their CPUs and GPUs, and until when.

The batch script's variables name the nodes and count CPUs; GPUs of every node and the end are only in
`scontrol --details show job`. Of a heterogeneous job both tell of all groups.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dapo_megatron.errors import ConfigError, DapoError
from launch.slurm_calls import slurm

NO_ARRAY = "submit the script without --array, once for each run_dir"


@dataclass(frozen=True)
class Node:
    """One node, and what this job has of it."""

    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Group:
    """Nodes that were asked for together: all of a plain job, or one component of a heterogeneous one."""

    job_id: int
    """The component's own; a plain job's is the job's."""
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Allocation:
    """All that a job has."""

    job_id: int
    """What scontrol and scancel are told; of a heterogeneous job the leader's, which stands for all."""
    restarts: int
    """How often the job was requeued and started again."""
    groups: tuple[Group, ...]
    """In the order of --het-group; a plain job has one."""
    can_requeue: bool
    """Whether SLURM puts it back when asked to: not with --no-requeue."""
    ends: float | None
    """Unix time of the job's time limit, the first of its groups'; None: it has none."""

    @property
    def is_heterogeneous(self) -> bool:
        """Whether srun needs --het-group to reach every node."""
        return len(self.groups) > 1

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Of all groups; the batch script runs on the first."""
        return tuple(node for group in self.groups for node in group.nodes)


def find_allocation(environment: Mapping[str, str]) -> Allocation:
    """The allocation of the job whose batch script has this environment; asks SLURM.

    Raises:
        ConfigError: not inside a job, or in a task of a job array.
        DapoError: scontrol failed, or did not answer.
    """
    shown = slurm("scontrol", "--details", "show", "job", str(job_number(environment)))
    return read_allocation(environment, shown, host_names)


def host_names(nodes: str) -> list[str]:
    """node[1-2] -> node1, node2, as SLURM does it."""
    return slurm("scontrol", "show", "hostnames", nodes).split()


def read_allocation(environment: Mapping[str, str], shown: str, expand: Callable[[str], list[str]]) -> Allocation:
    """The allocation that a batch script's environment and SLURM's answers tell of. Pure.

    Args:
        shown: `scontrol --details show job`, with times as Unix times (SLURM_TIME_FORMAT=%s).
        expand: host_names.

    Raises:
        ConfigError: not a batch script's environment, or that of a task of a job array.
        DapoError: the environment and `shown` are not of the same job.
    """
    job = job_number(environment)
    size = _number(environment, "SLURM_HET_SIZE", 0)
    details = by_job(shown)
    if re.match(r" ArrayJobId=", _details(details, job)):
        # Of one number, requeue, cancel and update are of the whole array.
        raise ConfigError(f"job {job} is a task of a job array, which cannot be put back alone: {NO_ARRAY}")
    suffixes = [f"_HET_GROUP_{i}" for i in range(size)] or [""]
    groups = tuple(_group(environment, suffix, details, expand) for suffix in suffixes)
    # SLURM ends a group at its own limit, and leaves the others alone.
    ends = [end for group in groups if (end := _end(_details(details, group.job_id))) is not None]
    restarts = _number(environment, "SLURM_RESTART_COUNT", 0)
    can_requeue = re.search(r"^ +Requeue=0 ", _details(details, job), re.MULTILINE) is None
    return Allocation(job, restarts, groups, can_requeue, min(ends, default=None))


def job_number(environment: Mapping[str, str], suffix: str = "") -> int:
    """The number of the job, or of the component of a heterogeneous one that `suffix` names.

    Raises:
        ConfigError: not inside a job.
    """
    _variable(environment, name := f"SLURM_JOB_ID{suffix}")
    return _number(environment, name, 0)


def expand_counts(text: str) -> list[int]:
    """SLURM's counts a node: "16(x3),8" -> [16, 16, 16, 8].

    Raises:
        ConfigError: the text is none.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if found is None:
            raise ConfigError(f"{text!r} is not a list of counts as SLURM writes it, such as 16(x3),8")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _group(
    environment: Mapping[str, str], suffix: str, details: Mapping[int, str], expand: Callable[[str], list[str]]
) -> Group:
    job = job_number(environment, suffix)
    names = expand(_variable(environment, f"SLURM_JOB_NODELIST{suffix}"))
    cpus = expand_counts(_variable(environment, f"SLURM_JOB_CPUS_PER_NODE{suffix}"))
    gpus = _gpus(_details(details, job), expand)
    if len(cpus) != len(names) or set(gpus) != set(names):
        raise DapoError(
            f"SLURM counts CPUs of {len(cpus)} nodes and GPUs of {', '.join(sorted(gpus)) or 'none'} where job {job} "
            f"has {', '.join(names)}: its nodes changed meanwhile"
        )
    return Group(job, tuple(Node(name, c, gpus[name]) for name, c in zip(names, cpus, strict=True)))


def _gpus(details: str, expand: Callable[[str], list[str]]) -> dict[str, int]:
    """GPUs of each node. A line of it: Nodes=node[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:h100:4(IDX:0-3),shard:2(...)"""
    lines = re.findall(r"^ +Nodes=(\S+) .*\bGRES=(\S*)", details, re.MULTILINE)
    kinds = r"(?:^|,)gpu(?::[^:(,]+)?:([0-9]+)"  # gpu:4 or gpu:h100:4, for each type of GPU
    return {name: sum(map(int, re.findall(kinds, gres))) for nodes, gres in lines for name in expand(nodes)}


def _end(details: str) -> float | None:
    found = re.search(r"^ +StartTime=\S+ EndTime=([0-9]+)", details, re.MULTILINE)
    return float(found[1]) if found else None


def by_job(shown: str) -> dict[int, str]:
    """What `scontrol show job` says of each group of a job, by its own number."""
    jobs = re.split(r"^JobId=([0-9]+)", shown, flags=re.MULTILINE)
    return {int(job): details for job, details in zip(jobs[1::2], jobs[2::2], strict=True)}


def _details(details: Mapping[int, str], job: int) -> str:
    if job not in details:
        raise DapoError(f"scontrol shows nothing of job {job}: is this its batch script?")
    return details[job]


def _variable(environment: Mapping[str, str], name: str) -> str:
    if not (value := environment.get(name, "").strip()):
        raise ConfigError(f"{name} is not set: this runs inside a SLURM job, from sbatch's script")
    return value


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """The default where the variable is empty: so does a script unset it that cannot do without its name."""
    value = environment.get(name, "").strip()
    if not value:
        return default
    if not value.isascii() or not value.isdigit():
        raise ConfigError(f"{name}={value} is no number: SLURM sets it, see who changes it in the batch script")
    return int(value)
