"""Child processes with a log each, and the promise that none is left behind."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Child:
    """A started process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    grace: bool
    processes: tuple[str, ...]
    """Names of all that it stands for, as in their statuses: a step of a job stands for several."""

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def told(self) -> str | None:
        """The one line in which it said why it failed (errors.exit_code), if it did."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)


class ProcessGroup:
    """Starts children and ends all of them, with everything they started, when the block is left.

    The launcher adopts orphaned grandchildren (PR_SET_CHILD_SUBREAPER), so that the workers of a killed
    SGLang server are found; children get SIGTERM when the launcher itself is killed (PR_SET_PDEATHSIG).
    """

    def __init__(self, log_dir: Path, grace_s: float = 5.0):
        self.log_dir, self.grace_s = log_dir, grace_s
        self.children: list[Child] = []

    def __enter__(self) -> "ProcessGroup":
        self.log_dir.mkdir(parents=True, exist_ok=True)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        *,
        grace: bool = True,
        processes: tuple[str, ...] = (),
    ) -> Child:
        """Start a process; its output goes to <log_dir>/<name>.log. Without `grace` it is ended by SIGKILL at once.

        Args:
            processes: names of those that it stands for, if it is not the one itself.
        """
        log = self.log_dir / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the rest in order
                preexec_fn=_die_with_parent,
            )
        child = Child(name, process, log, grace, processes or (name,))
        self.children.append(child)
        return child

    def exited(self) -> list[Child]:
        """Children that have ended, in the order they were started."""
        return [c for c in self.children if c.process.poll() is not None]

    def end(self, children: Sequence[Child]) -> None:
        """End some children, as `stop` does all, and forget them."""
        trees = {child.name: tree(child) for child in children}
        for child in children:
            _signal(trees[child.name], signal.SIGTERM if child.grace else signal.SIGKILL)
        end = time.monotonic() + self.grace_s
        while any(child.process.poll() is None for child in children) and time.monotonic() < end:
            time.sleep(0.1)
        self.forget(children)
        known = {child.process.pid for child in self.children}
        # Whoever has lost its parent is this process's child now, and was of those that have ended.
        orphans = [p for p in psutil.Process().children() if p.pid not in known]
        left = [p for tree in trees.values() for p in tree]
        left += [p for orphan in orphans for p in [orphan, *orphan.children(recursive=True)]]
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=self.grace_s)
        for child in children:
            child.process.wait()

    def forget(self, children: Sequence[Child]) -> None:
        """Children that have ended."""
        self.children = [child for child in self.children if child not in children]

    def stop(self) -> None:
        """SIGTERM to every descendant of this process, then SIGKILL to what is left when the children have ended (they
        wait for their own as long as they need them) or the grace period has passed."""
        end = time.monotonic() + self.grace_s
        for child in self.children:
            if not child.grace and child.process.poll() is None:
                server = psutil.Process(child.process.pid)
                _signal([server, *server.children(recursive=True)], signal.SIGKILL)
        _signal(psutil.Process().children(recursive=True), signal.SIGTERM)
        while len(self.exited()) < len(self.children) and time.monotonic() < end:
            time.sleep(0.1)
        while left := psutil.Process().children(recursive=True):
            _signal(left, signal.SIGKILL)
            psutil.wait_procs(left, timeout=1.0)
        for child in self.children:
            child.process.poll()


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """SIGTERM and Ctrl-C end the block with KeyboardInterrupt.

    Yields a check to call in loops: an exception that a signal raises while a child is forked (in a callback of
    os.register_at_fork) is printed and lost, and the check raises it again.
    """
    asked = False

    def interrupt(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tree(child: Child) -> list[psutil.Process]:
    """It and all that it has started; what ends meanwhile is left out."""
    try:
        process = psutil.Process(child.process.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
