"""A real SLURM cluster on this machine: each node is a set of namespaces (network, name, processes, mounts, IPC).

    login    munged and slurmctld; where users type their commands         10.77.0.254
    nodeK    slurmd                                                        10.77.0.K

A bridge in the login node's network namespace links them, so two clusters do not see each other. /tmp and /dev/shm are
each node's own; every other folder is shared. Jobs run as root.

The nodes end with the process that started them, however that ends (node.sh); what a killed one leaves, its folder and
in the worst case a node, is removed when the next cluster starts.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from tests.slurm.folders import free_folder, record_init, remove_abandoned
from tests.slurm.slurm_conf import LOGIN, MESSAGE_TIMEOUT_S, address, gres_conf, hosts, slurm_conf

REPOSITORY = Path(__file__).parents[2]
NODE = Path(__file__).with_name("node.sh")
UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "unshare", "nsenter", "ip", "mount")
DAEMONS = {"slurmctld", "slurmscriptd", "slurmd", "munged"}
LEAVE_S = 3.0
"""For the processes of a job that has ended."""
BOOT_S = 30.0
"""Until every node is up, and until one is gone."""


class Cluster:
    """node1 .. nodeN and a login node, up inside the `with` block.

    Attributes:
        shared: a folder that all nodes see.
    """

    def __init__(self, nodes: int, *, cpus: int = 16, gpus: int = 8):
        self.nodes = [f"node{k}" for k in range(1, nodes + 1)]
        self.cpus, self.gpus = cpus, gpus
        self.folder = free_folder()
        self.shared = self.folder / "shared"
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}
        self._cut: set[str] = set()

    def __enter__(self) -> "Cluster":
        remove_abandoned()
        try:
            self._write_files()
            for node in (LOGIN, *self.nodes):
                self._boot(node)
            self.wait_until(self.all_idle, BOOT_S, "all nodes to be idle")
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def down(self) -> None:
        """End every node and remove the folder."""
        for node in reversed(list(self._inits)):
            self._kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def tidy(self) -> None:
        """Cancel every job, bring every node back, and end what is left. A node that was cut off learns it late.

        Raises:
            AssertionError: a process was left on a node after its job.
        """
        self.run("scancel", "--user=root")
        was_cut = set(self._cut)
        for node in self.nodes:
            if node not in self._pids:
                self.power_on(node)
            elif node in self._cut:
                self.heal(node)
        self.wait_until_empty()
        self.wait_until(self.all_idle, BOOT_S, "all nodes to be idle")
        if was_cut:
            # What runs on a node that comes back is ended when the node registers, but not so soon after its job's end.
            time.sleep(MESSAGE_TIMEOUT_S + 1)
            self.run("scontrol", "reconfigure")
        if left := self._left_after(BOOT_S if was_cut else LEAVE_S):
            for process, _ in list(self.running()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.wait_until(lambda: not self._left_after(0), BOOT_S, "the last processes to go")
            raise AssertionError(f"left on the nodes: {left}")

    def _left_after(self, seconds: float) -> dict[str, list[str]]:
        end = time.monotonic() + seconds
        while left := {node: commands for node, commands in self.processes().items() if commands}:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return left

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, *command: str, node: str = LOGIN, timeout_s: float = 60.0, check: bool = True) -> str:
        """What a command prints that is typed on a node, in the repository's folder.

        Raises:
            RuntimeError: it failed (with `check`), or took longer than `timeout_s`; says what it printed, and stderr.
        """
        # timeout(1), not Python's: a killed nsenter leaves the command behind.
        limited = ["timeout", "--kill-after=5", str(timeout_s), *command]
        done = subprocess.run(
            self._inside(node, limited),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s + 10,  # where something in the background keeps the output open
        )
        printed, what = done.stdout + done.stderr, f"{' '.join(command)} on {node}"
        if done.returncode in (124, 137):
            raise RuntimeError(f"{what} took more than {timeout_s:g} s:\n{printed}")
        if check and done.returncode:
            raise RuntimeError(f"{what} ended with {done.returncode}:\n{printed}")
        return done.stdout

    def start(self, *command: str, node: str = LOGIN) -> subprocess.Popen[str]:
        """A command on a node that runs in the background; stderr goes to stdout, a pipe."""
        return subprocess.Popen(
            self._inside(node, list(command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def sbatch(self, script: str, *options: str, arguments: Sequence[str] = ()) -> int:
        """Submit a script's text, to run with `arguments`; returns the job's id. It prints to shared/<job id>.out."""
        path = self.shared / f"job-{time.monotonic_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script.lstrip()}")
        return int(
            self.run("sbatch", "--parsable", f"--output={self.shared}/%j.out", *options, str(path), *arguments).strip()
        )

    def output(self, job: int) -> str:
        """What a job has printed so far."""
        path = self.shared / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, ExitCode, Restarts, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job)).splitlines()[0].split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def wait_for_state(self, job: int, *states: str, timeout_s: float = 30.0) -> dict[str, str]:
        """Wait until a job is in one of the states (RUNNING, COMPLETED, ...); returns what is known of it."""
        self.wait_until(
            lambda: self.job(job)["JobState"] in states, timeout_s, f"job {job} to be {' or '.join(states)}"
        )
        return self.job(job)

    def wait_until_empty(self, timeout_s: float = 30.0) -> None:
        """Wait until no job is queued, running or ending."""
        self.wait_until(lambda: not self.run("squeue", "--noheader").strip(), timeout_s, "squeue to be empty")

    def wait_until(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: says what was waited for, and shows queue, nodes and the ends of the logs.
        """
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout_s:g} s for {what}\n{self._look()}")
            time.sleep(0.1)

    def all_idle(self) -> bool:
        """Whether every node is up and has no job."""
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def processes(self) -> dict[str, list[str]]:
        """Command lines of what runs on each node that is on, SLURM's daemons and the node's first process left out."""
        found: dict[str, list[str]] = {node: [] for node in self._pids}
        for process, node in self.running():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[node].append(" ".join(process.cmdline()) or f"[{process.name()}]")
        return found

    def running(self) -> Iterator[tuple[psutil.Process, str]]:
        spaces = {os.readlink(f"/proc/{pid}/ns/pid"): node for node, pid in self._pids.items()}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):  # gone meanwhile, or not ours
                node = spaces.get(os.readlink(f"/proc/{process.pid}/ns/pid"))
                if node and process.pid != self._pids[node] and process.name() not in DAEMONS:
                    yield process, node

    # --- accidents ----------------------------------------------------------------------------------------------------

    def power_off(self, node: str) -> None:
        """End a node at once. Its link goes first: no peer gets a last packet."""
        self._ip(LOGIN, "link", "delete", f"v{node}")
        self._cut.discard(node)
        self._kill(node)

    def power_on(self, node: str) -> None:
        """Start a node again, with an empty /tmp; SLURM takes it back within seconds."""
        self._boot(node)

    def cut(self, node: str) -> None:
        """Pull a node's network cable."""
        self._ip(LOGIN, "link", "set", f"v{node}", "down")
        self._cut.add(node)

    def heal(self, node: str) -> None:
        """Plug it in again. SLURM, which looks for a lost node every minute, looks for it now."""
        self._ip(LOGIN, "link", "set", f"v{node}", "up")
        self._cut.discard(node)
        self.run("scontrol", "reconfigure")

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        for name in ("etc/slurm", "log", "state", "munge", "devices", "shared"):
            (self.folder / name).mkdir(parents=True)
        for node in (LOGIN, *self.nodes):
            (self.folder / "nodes" / node).mkdir(parents=True)
        for gpu in range(self.gpus):
            # SLURM numbers devices, not plain files; these are /dev/null.
            os.mknod(self.folder / "devices" / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        etc = self.folder / "etc"
        (etc / "hosts").write_text(hosts(self.nodes))
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "slurm" / "slurm.conf").write_text(slurm_conf(self.folder, self.nodes, self.cpus, self.gpus))
        (etc / "slurm" / "gres.conf").write_text(gres_conf(self.folder, self.nodes, self.gpus))
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _boot(self, node: str) -> None:
        with (self.folder / "log" / f"{node}.log").open("ab") as log:
            init = subprocess.Popen(
                [*UNSHARE, "bash", str(NODE), node, str(self.folder), str(REPOSITORY)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        self._inits[node] = init
        self.wait_until(lambda: init.poll() is not None or _children(init), BOOT_S, f"{node}'s first process")
        if init.poll() is not None:
            raise RuntimeError(f"{node} ended at once\n{self._look()}")
        # It is in the new namespaces from its beginning.
        self._pids[node] = pid = _children(init)[0]
        record_init(self.folder, node, pid)
        self._wire(node)
        init.stdin.write(b"go\n")
        init.stdin.flush()

    def _wire(self, node: str) -> None:
        self._ip(node, "link", "set", "lo", "up")
        device = "br0" if node == LOGIN else "eth0"
        if node == LOGIN:
            self._ip(LOGIN, "link", "add", device, "type", "bridge")
        else:
            peer = ("type", "veth", "peer", "name", device, "netns", str(self._pids[node]))
            self._ip(LOGIN, "link", "add", f"v{node}", *peer)
            self._ip(LOGIN, "link", "set", f"v{node}", "master", "br0", "up")
        self._ip(node, "address", "add", f"{address(node)}/24", "dev", device)
        self._ip(node, "link", "set", device, "up")

    def _kill(self, node: str) -> None:
        """Its first process takes the namespaces with it: processes, mounts and interfaces."""
        init, pid = self._inits.pop(node), self._pids.pop(node, None)
        if pid is not None and init.poll() is None:
            os.kill(pid, signal.SIGKILL)
        init.stdin.close()
        init.wait(BOOT_S)

    def _ip(self, node: str, *arguments: str) -> str:
        command = ["nsenter", "--target", str(self._pids[node]), "--net", "ip", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _inside(self, node: str, command: list[str]) -> list[str]:
        enter = ["nsenter", "--target", str(self._pids[node]), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*enter, f"--wdns={REPOSITORY}", "--", *command]

    def _look(self) -> str:
        seen = [self.run(*words, check=False) for words in (("squeue",), ("sinfo", "-N", "-l"))] if self._pids else []
        for log in sorted((self.folder / "log").glob("*.log")):
            seen.append(f"{log.name}: " + "\n".join(log.read_text(errors="replace").splitlines()[-5:]))
        return "\n".join(seen)


def obstacle() -> str | None:
    """Why there can be no cluster here; None: nothing is in its way."""
    if os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs root"
    if missing := [p for p in PROGRAMS if shutil.which(p) is None]:
        return f"{', '.join(missing)} missing: `make test-slurm` installs SLURM"
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True)
    if tried.returncode:
        return f"namespaces are not allowed here: {tried.stderr.strip()}"
    return None


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    with contextlib.suppress(FileNotFoundError):  # it has ended
        return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []
