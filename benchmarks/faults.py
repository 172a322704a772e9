"""What can happen to a job: the faults of the chaos runs, and a job to inflict them on."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from dapo_megatron.checkpoint.manifest import MANIFEST
from dapo_megatron.errors import DapoError
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.process import read_statuses
from dapo_megatron.run_folder import RunFolder

LIFE_S = 240.0
"""Longest wait for anything a job should do."""
LOOK_S = 0.002
SMALL_DISK = "small_disk"
MODULES = {
    "trainer rank": "dapo_megatron.trainer",
    "controller": "dapo_megatron.rollout",
    "engine": "sglang.launch_server",
}


class Job:
    """One run, started again and again from its command line."""

    def __init__(self, recipe: Path, folder: RunFolder, overrides: list[str], disk: Path | None):
        """`disk` is a small disk that the run folder is on."""
        self.recipe, self.folder, self.overrides, self.disk = recipe, folder, overrides, disk
        self._process: subprocess.Popen[str] | None = None
        self._seen = 0
        self._all: list[psutil.Process] = []

    def start(self, *overrides: str, resume: str = "--resume") -> None:
        """Begin a life: of a new run, if there is nothing to go on from."""
        self._seen = len(read_metrics(self.folder))
        flags = [resume] if self.folder.config.exists() else []
        run_dir = f"run_dir={self.folder.path}"
        command = [sys.executable, "-m", "dapo_megatron.cli", "run", str(self.recipe), run_dir]
        self._process = subprocess.Popen(
            [*command, *self.overrides, *overrides, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def process(self) -> subprocess.Popen[str]:
        """The launcher of this life."""
        assert self._process is not None
        return self._process

    def wait_for_steps(self, count: int) -> None:
        """Wait until this life has recorded `count` steps."""
        self.wait(lambda: len(read_metrics(self.folder)) >= max(self._recorded_after_the_cut(), 1) + count, "a step")

    def _recorded_after_the_cut(self) -> int:
        # A resume cuts the records back to its checkpoint before it writes the first new one.
        self._seen = min(self._seen, len(read_metrics(self.folder)))
        return self._seen

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something to be so.

        Raises:
            DapoError: the job ended before, or it took too long.
        """
        end = time.monotonic() + LIFE_S
        while not condition():
            if self.process.poll() is not None:
                raise DapoError(f"the job ended before {what}:\n{self.process.communicate()[0][-3000:]}")
            if time.monotonic() > end:
                raise DapoError(f"no {what} within {LIFE_S:.0f} s")
            time.sleep(LOOK_S)

    def members(self, role: str, forks: bool = True) -> list[psutil.Process]:
        """Living processes of the job by their role; without `forks` those that the launcher itself started."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=forks):
            with suppress(psutil.NoSuchProcess):
                if MODULES[role] in process.cmdline():
                    found.append(process)
        return found

    def note_all(self) -> None:
        """Remember every process of this life, for `left`."""
        self._all = psutil.Process(self.process.pid).children(recursive=True)

    def kill_all(self) -> str:
        """SIGKILL to every process at once, as when the node dies."""
        self.note_all()
        for process in [psutil.Process(self.process.pid), *self._all]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return self.finish(-signal.SIGKILL)

    def finish(self, code: int | None = None) -> str:
        """Wait for the end of this life; returns what it printed."""
        try:
            output, _ = self.process.communicate(timeout=LIFE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise DapoError(f"the job did not end within {LIFE_S:.0f} s") from None
        if code is not None and self.process.returncode != code:
            raise DapoError(f"exit code {self.process.returncode}, expected {code}:\n{output[-3000:]}")
        return output

    def left(self) -> list[int]:
        """Processes of this life that are still there."""
        psutil.wait_procs(self._all, timeout=10)
        return [p.pid for p in alive(self._all)]

    def partial(self, name: str = "") -> bool:
        """Whether a checkpoint is being written, and (part of) a file of it is there."""
        return any(self.folder.checkpoints.glob(f".step_*.partial/{name}" if name else ".step_*.partial"))

    def phase(self, phase: str) -> bool:
        """Whether a trainer rank is in a phase."""
        try:
            return any(s.phase == phase for s in read_statuses(self.folder) if s.process.startswith("trainer"))
        except (OSError, msgspec.MsgspecError):  # the file is being replaced
            return False


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a dead one that nobody has collected yet does not."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@dataclass(frozen=True)
class Fault:
    """Something that ends a life of the run, or (`damage`) happens to its newest checkpoint afterwards."""

    name: str
    exit_code: int
    inflict: Callable[[Job, random.Random], None]
    damage: Callable[[Path, random.Random], None] = lambda path, rng: None
    needs_small_disk: bool = False

    def strike(self, job: Job, rng: random.Random) -> tuple[int, str]:
        """Inflict it and wait for the end; returns (exit code, output)."""
        self.inflict(job, rng)
        output = job.finish()
        if self.needs_small_disk and job.disk is not None:
            (job.disk / "filler").unlink(missing_ok=True)
        return job.process.returncode, output


def kill(job: Job, role: str, rng: random.Random) -> None:
    """SIGKILL to one process of a role."""
    job.note_all()
    with suppress(psutil.NoSuchProcess):
        rng.choice(job.members(role)).kill()


def at_a_random_moment(role: str) -> Callable[[Job, random.Random], None]:
    """Kill somebody within the next steps."""

    def inflict(job: Job, rng: random.Random) -> None:
        time.sleep(rng.uniform(0, 6))
        kill(job, role, rng)

    return inflict


def when(condition: Callable[[Job], bool], what: str, role: str) -> Callable[[Job, random.Random], None]:
    """Kill somebody as soon as something is so."""

    def inflict(job: Job, rng: random.Random) -> None:
        job.wait(lambda: condition(job), what)
        time.sleep(rng.uniform(0, 0.02))
        kill(job, role, rng)

    return inflict


def everything(job: Job, rng: random.Random) -> None:
    """The node dies."""
    time.sleep(rng.uniform(0, 6))
    job.kill_all()


def terminate(job: Job, rng: random.Random) -> None:
    """SIGTERM to the launcher."""
    time.sleep(rng.uniform(0, 6))
    job.note_all()
    job.process.terminate()


def fill_disk(job: Job, rng: random.Random) -> None:
    """Fill the disk, up to some bytes, once a checkpoint is there."""
    assert job.disk is not None
    job.note_all()
    left, block = rng.choice([0, 200_000, 3_000_000]), bytes(1 << 16)
    # Unbuffered: what a buffer could not write would be tried again, and raise, when the file is closed.
    with (job.disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while (room := os.statvfs(job.disk)).f_bavail * room.f_frsize > left:
            file.write(block)


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """In a file of the checkpoint."""
    file = rng.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_short(path: Path, rng: random.Random) -> None:
    """A file of the checkpoint."""
    file = rng.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size))
    os.truncate(file, rng.randrange(file.stat().st_size))


def older_manifest(path: Path, rng: random.Random) -> None:
    """As an earlier version of this program wrote it."""
    tree = msgspec.json.decode((path / MANIFEST).read_bytes()) | {"schema": 2}
    (path / MANIFEST).write_bytes(msgspec.json.encode(tree))


FAULTS = (
    *(Fault(f"kill -9 of the {role}", 1, at_a_random_moment(role)) for role in MODULES),
    Fault("kill -9 of every process", -signal.SIGKILL, everything),
    Fault("kill -9 of a rank during a save", 1, when(lambda j: j.partial("model/*"), "save", "trainer rank")),
    Fault("kill -9 of a rank during a publication", 1, when(lambda j: j.partial("hf"), "publication", "trainer rank")),
    Fault("kill -9 of a rank during a push", 1, when(lambda j: j.phase("push"), "push", "trainer rank")),
    Fault("kill -9 of the engine during a push", 1, when(lambda j: j.phase("push"), "push", "engine")),
    Fault("SIGTERM", 130, terminate),
    Fault("disk full", 1, fill_disk, needs_small_disk=True),
)
BETWEEN = (
    Fault("a bit flipped in a checkpoint", 0, everything, flip_a_bit),
    Fault("a file of a checkpoint cut short", 0, everything, cut_short),
    Fault("a manifest of an older version", 0, everything, older_manifest),
)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path | None]:
    """A tmpfs mounted in `folder`; None where that is not allowed."""
    place = folder / SMALL_DISK
    place.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    """End the small disk in `folder`, also one that somebody who was killed has left."""
    if (folder / SMALL_DISK).is_mount():
        subprocess.run(["umount", "--lazy", str(folder / SMALL_DISK)], check=True)
