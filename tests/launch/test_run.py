"""Whole jobs from the command line, every part real: they end well, die clearly, leave nothing behind, and resume."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
import zmq

from benchmarks.faults import alive
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.checkpoint.store import latest, published
from dapo_megatron.keys import read_keys
from dapo_megatron.messages import Hello
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import finish, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEARTBEAT_S = 12
STRIKES = [("trainer rank", signal.SIGSTOP)]  # tests/distributed/test_chaos.py kills others
if os.environ.get("LAYOUTS") == "all":
    STRIKES += [("engine", signal.SIGKILL), ("trainer rank", signal.SIGKILL), ("engine", signal.SIGSTOP)]
    STRIKES += [("controller", signal.SIGKILL), ("controller", signal.SIGSTOP)]
ROLES = {
    "engine": "sglang.launch_server",
    "controller": "dapo_megatron.rollout",
    "trainer rank": "dapo_megatron.trainer",
}


def command(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return []


def descendants(process, role):
    return [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if any(ROLES[role] in part for part in command(p)) and "torch.distributed.run" not in command(p)
    ]


def wait_for_steps(run_dir, count, process):
    while len(read_metrics(RunFolder(run_dir))) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


def option(process, role, name):
    """The value of an option on the command line of a run's process."""
    line = command(descendants(process, role)[0])
    return line[line.index(name) + 1]


def nobody_else_is_answered(process):
    """Who has no key can neither change an engine nor end the controller; nor is a key on a command line."""
    engine = f"http://127.0.0.1:{option(process, 'engine', '--port')}"
    for path, body in (
        ("/update_weight_version", {"new_version": "99", "abort_all_requests": True}),
        ("/update_weights_from_disk", {"model_path": "/tmp"}),
        ("/pause_generation", {"mode": "abort"}),
        ("/begin_weight_update", {}),
        ("/generate", {"input_ids": [1]}),
    ):
        for headers in ({}, {"Authorization": "Bearer guess"}):
            assert httpx.post(engine + path, json=body, headers=headers, timeout=20).status_code == 401, path
    port = int(option(process, "controller", "--link").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(bytes(range(256)) * 40)
    with zmq.Context() as context, context.socket(zmq.REQ) as s:
        s.setsockopt(zmq.LINGER, 0)
        s.connect(f"tcp://127.0.0.1:{port}")
        s.send(msgspec.msgpack.encode(Hello(0)))
        assert not s.poll(1000)
    key = read_keys(RunFolder(Path(option(process, "controller", "--config")).parent)).engine_api_key
    assert not any(key in part for p in psutil.process_iter() for part in command(p))


def status(run_dir):
    """(exit code, what it shows) of launch.status."""
    done = subprocess.run([sys.executable, "-m", "launch.status", str(run_dir)], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_run_is_stopped_dies_resumes_and_ends(job):
    recipe, run_dir = job
    process = start(recipe, "trainer.steps=1000", "checkpoint.every=1000")
    wait_for_steps(run_dir, 3, process)
    everything = psutil.Process(process.pid).children(recursive=True)
    code, output, _ = finish(start(recipe, "--resume"))
    assert code == 1 and f"in use by another launcher (pid {process.pid} on " in output
    nobody_else_is_answered(process)
    code, shown = status(run_dir)
    assert code == 0 and shown.startswith("running  ") and "engine-0 http://127.0.0.1:" in shown
    for name in ("launcher", "controller", "trainer-0", "trainer-1"):
        assert re.search(rf"^{name} .* [0-2] s ago", shown, re.MULTILINE), shown
    seen = len(read_metrics(RunFolder(run_dir)))
    folder = RunFolder(run_dir)
    assert not published(folder)
    folder.save_request.touch()
    wait_for_steps(run_dir, seen + 3, process)
    assert not folder.save_request.exists()
    (asked_for,) = published(folder)
    assert read_manifest(asked_for).format == "fully_reshardable"
    process.terminate()
    code, output, seconds = finish(process)
    assert code == 130 and "interrupted" in output and seconds < 30
    assert not alive(everything)
    assert status(run_dir)[0] == 4
    saved = read_manifest(latest(RunFolder(run_dir)))
    assert saved.format == "fully_reshardable" and saved.step == read_metrics(RunFolder(run_dir))[-1]["step"] > seen + 1
    assert (run_dir / "report.html").stat().st_size > 100_000
    first = run_dir / "logs" / "attempt_001"
    assert folder.logs.resolve() == first.resolve()
    assert {p.stem for p in first.iterdir()} == {"controller", "engine-0", "trainer-0", "trainer-1"}

    code, output, _ = finish(start(recipe))
    assert code == 1 and "holds a run already" in output

    for role, number in STRIKES:
        seen = len(read_metrics(RunFolder(run_dir)))
        deadline = f"launch.{'engine' if role == 'engine' else 'heartbeat'}_timeout_s={HEARTBEAT_S}"
        process = start(recipe, "--resume", "trainer.steps=1000", deadline)
        wait_for_steps(run_dir, seen + 1, process)
        everything = psutil.Process(process.pid).children(recursive=True)
        struck = descendants(process, role)[0].pid
        os.kill(struck, number)
        code, output, seconds = finish(process)
        assert code == 1 and seconds < HEARTBEAT_S + 10, (role, seconds, output)
        assert role.split()[0] in output and ".log" in output
        if number == signal.SIGSTOP:
            (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
            says = "engine-0 (" if role == "engine" else f"pid {struck} on "
            assert says in line and " hangs: " in line
            assert ("has not answered" if role == "engine" else "in phase ") in line
        assert not alive(everything), role
        code, shown = status(run_dir)
        assert code == 1 and role.split()[0] in shown.splitlines()[0]
        # Whatever the moment: who goes on from a checkpoint has the record of its step.
        assert read_metrics(RunFolder(run_dir))[-1]["step"] >= int(
            latest(RunFolder(run_dir)).name.removeprefix("step_")
        )

    last = read_metrics(RunFolder(run_dir))[-1]["step"] + 2
    code, output, _ = finish(start(recipe, "--resume", f"trainer.steps={last}"))
    assert code == 0, output
    code, shown = status(run_dir)
    assert code == 0 and shown.startswith(f"finished  finished at step {last} of {last}") and f"step {last}, " in shown
    records = read_metrics(RunFolder(run_dir))
    assert [r["step"] for r in records] == list(range(last + 1))
    # 2 updates a step, 8 of warm-up: after step s the rate is lr * min(1, 2 s / 8), across every resume.
    assert [r["optimizer/lr"] for r in records[1:]] == pytest.approx([1e-3 * min(1, s / 4) for s in range(1, last + 1)])
    assert all(r["sync/logprob_difference"] <= 1e-4 for r in records[1:])


def test_terminate_in_the_warm_up_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dapo_megatron.cli", "demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (everything := descendants(process, "trainer rank")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.terminate()
    code, output, seconds = finish(process)
    assert code == 130 and "interrupted" in output and seconds < 30
    assert not alive(everything)
