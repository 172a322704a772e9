"""What a batch script asks SLURM for, and which run it starts: read from its #SBATCH lines and its last one. Pure.

Only what decides size and end of the job is read: --nodes, --gpus-per-node or --gres=gpu:, --ntasks-per-node with
--cpus-per-task, or --cpus-per-gpu; --mem, --mem-per-cpu or --mem-per-gpu; --time and --signal. A line `#SBATCH hetjob`
begins the next group of a heterogeneous job. A job array is refused.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from dapo_megatron.errors import ConfigError
from launch.allocation import NO_ARRAY
from launch.time_limit import read_signal, read_time

SHORT = {
    "-N": "--nodes",
    "-c": "--cpus-per-task",
    "-n": "--ntasks",
    "-G": "--gpus",
    "-w": "--nodelist",
    "-t": "--time",
    "-a": "--array",
}
READ = (
    "--nodes",
    "--gpus-per-node",
    "--gres",
    "--ntasks-per-node",
    "--cpus-per-task",
    "--cpus-per-gpu",
    "--mem",
    "--mem-per-cpu",
    "--mem-per-gpu",
    "--exclusive",
    "--time",
    "--signal",
    "--array",
)
UNREAD = {
    "--gpus": "--gpus-per-node",
    "--gpus-per-task": "--gpus-per-node",
    "--gpus-per-socket": "--gpus-per-node",
    "--tres-per-node": "--gpus-per-node",
    "--tres-per-task": "--gpus-per-node",
    "--ntasks": "--nodes",
    "--nodelist": "--nodes",
}
"""Options that change the size of a job without saying how many nodes, or GPUs of each, and the one that does."""
MODULE = "launch.slurm"
OPERATORS = frozenset(";|&<>")
"""Of the shell: what follows them is no argument of the launcher."""
ARGUMENTS = re.compile(r""" *("?)\$(?:@|\{@\})\1""")
"""Where a script hands on what it was given itself: "$@"."""
GIB_OF = {"K": 2**-20, "M": 2**-10, "": 2**-10, "G": 1, "T": 2**10}
"""SLURM's units of memory."""


@dataclass(frozen=True)
class Request:
    """Equal nodes that are asked for together."""

    nodes: int
    gpus: int
    """Of each node."""
    cpus: int
    """Of each node."""
    gpu_type: str | None = None
    """SLURM's name for the kind of GPU, such as h200."""
    memory_gib: float | None = None
    """Of each node; None: as much as the cluster gives, or all of it."""


@dataclass(frozen=True)
class Script:
    """A batch script that ends in python -m launch.slurm."""

    groups: tuple[Request, ...]
    """One of a plain job; of a heterogeneous one those that train and those that generate."""
    recipe: str
    overrides: tuple[str, ...]
    """That the script sets itself."""
    limit_s: float | None = None
    """The time limit of the job, the shortest of its groups'; None: it says none."""
    signal_s: float | None = None
    """Seconds before it at which the launcher gets SIGUSR1; None: it gets none."""


def read_script(text: str, where: str) -> Script:
    """The request and the run of a batch script.

    Raises:
        ConfigError: `where` says what cannot be read.
    """
    groups: list[dict[str, str]] = [{}]
    for words in _sbatch_lines(text, where):
        if words in (["hetjob"], ["packjob"]):
            groups.append({})
        else:
            groups[-1] |= _options(words)
    recipe, overrides = _run(text, where)
    limits = [limit for g in groups if "--time" in g and (limit := read_time(g["--time"], where)) is not None]
    signals = [read_signal(g["--signal"], where) if "--signal" in g else None for g in groups]
    requests = tuple(_request(group, where) for group in groups)
    # The script runs in the first group, and a signal is of one.
    return Script(requests, recipe, overrides, min(limits, default=None), signals[0])


def filled(text: str, arguments: Sequence[str], where: str) -> str:
    """The script as it runs when `sbatch SCRIPT arguments` starts it.

    Raises:
        ConfigError: it would not hear of its arguments.
    """
    if arguments and ARGUMENTS.search(text) is None:
        raise ConfigError(f'{where} hands on no argument, and {arguments[0]} is one: end its last line in "$@"')
    return ARGUMENTS.sub(lambda _: "".join(f" {shlex.quote(a)}" for a in arguments), text)


def _words(line: str, where: str, apart: str = "") -> list[str]:
    """
    Args:
        apart: characters that are words of their own, where they are not quoted.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=apart)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError as e:
        raise ConfigError(f"{where}: {line.strip()!r} is no whole line of words ({e}): quote it on one line") from None


def _sbatch_lines(text: str, where: str) -> list[list[str]]:
    """The words of each #SBATCH line; SLURM looks no further than the first command."""
    found = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            found.append(_words(line.removeprefix("#SBATCH"), where))
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return found


def _options(words: Sequence[str]) -> dict[str, str]:
    """--name=value, --name value, -N value and -Nvalue, of those that are READ or UNREAD."""
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if word[:2] in SHORT and not word.startswith("--"):
            name, value = SHORT[word[:2]], word[2:].removeprefix("=")
        if name in READ or name in UNREAD:
            found[name] = value or (words[i + 1] if i + 1 < len(words) else "")
    return found


def _request(options: dict[str, str], where: str) -> Request:
    if "--array" in options:
        raise ConfigError(f"{where}: --array={options['--array']}: no task of an array is put back alone: {NO_ARRAY}")
    for name, instead in UNREAD.items():
        is_of_gpus = not name.startswith("--tres") or "gpu" in options.get(name, "")
        if name in options and is_of_gpus and instead not in options:
            raise ConfigError(f"{where}: {name} does not say how many nodes, or GPUs of each: write {instead}")
    kind, gpus = _gpus(options, where)

    def number(name: str, default: int) -> int:
        value = options.get(name, str(default))
        if not value.isascii() or not value.isdigit() or int(value) == 0:
            raise ConfigError(f"{where}: {name}={value} is not one number: write one")
        return int(value)

    if "--cpus-per-gpu" in options:
        cpus = number("--cpus-per-gpu", 1) * max(1, gpus)
    else:
        cpus = number("--ntasks-per-node", 1) * number("--cpus-per-task", 1)
    return Request(number("--nodes", 1), gpus, cpus, kind, _memory(options, cpus, gpus, where))


def _memory(options: dict[str, str], cpus: int, gpus: int, where: str) -> float | None:
    """GiB of a node; None: it is not said, it is all (0), or of CPUs or GPUs whose number the cluster chooses."""
    for name, count in (("--mem", 1), ("--mem-per-cpu", cpus), ("--mem-per-gpu", gpus)):
        if name not in options or (name != "--mem" and {"--exclusive", "--ntasks"} & options.keys()):
            continue
        found = re.fullmatch(r"([0-9]+)([KMGT]?)B?", options[name].upper())
        if found is None:
            raise ConfigError(f"{where}: {name}={options[name]} is no size of memory: write one, such as 64G")
        return int(found[1]) * GIB_OF[found[2]] * count or None
    return None


def _gpus(options: dict[str, str], where: str) -> tuple[str | None, int]:
    """(type, number) from h200:8 or 8; in --gres after gpu:."""
    value = options.get("--gpus-per-node")
    if value is None:
        parts = [part.removeprefix("gres:").removeprefix("gres/") for part in options.get("--gres", "").split(",")]
        given = [part for part in parts if part.split(":")[0] == "gpu"]
        if not given:
            return None, 0
        value = ",".join(part.removeprefix("gpu").removeprefix(":") or "1" for part in given)
    found = re.fullmatch(r"(?:([A-Za-z][^:,]*):)?([0-9]+)", value)
    if found is None:
        raise ConfigError(f"{where}: {value!r} is no number of GPUs a node: write one, such as 8 or h200:8")
    return found[1], int(found[2])


def _run(text: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(recipe, overrides) of the line that starts the launcher."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#") or MODULE not in line:
            continue
        words = _words(line, where, "".join(OPERATORS))
        if MODULE not in words:
            continue
        words = list(takewhile(lambda word: not set(word) <= OPERATORS, words[words.index(MODULE) + 1 :]))
        # --recipe=a.yaml as two words
        words = [part for word in words for part in re.split(r"(?<=^--recipe)=", word)]
        if "--recipe" in words[:-1]:
            at = words.index("--recipe")
            rest = words[:at] + words[at + 2 :]
            return words[at + 1], tuple(w for w in rest if "=" in w and not w.startswith("-"))
    raise ConfigError(f"{where} has no line `python -m {MODULE} --recipe RECIPE`: is it one of slurm/*.sh?")
