"""One launcher for a run folder."""

import os
import socket
import subprocess
import sys

import msgspec
import psutil
import pytest

from dapo_megatron.errors import ConfigError
from launch.lock import Holder, _remove_stale, locked

HOLD = """
import sys, time, pathlib
from launch.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_launcher_is_refused_and_told_who_holds_it(tmp_path):
    path = tmp_path / "launcher.lock"
    other = hold(path)
    try:
        with pytest.raises(ConfigError) as e, locked(path):
            pass
        assert f"pid {other.pid} on {socket.gethostname()}" in str(e.value) and "\n" not in str(e.value)
        assert path.exists()
    finally:
        other.kill()
        other.wait()


def test_the_lock_of_a_killed_launcher_is_taken(tmp_path):
    path = tmp_path / "launcher.lock"
    other = hold(path)
    other.kill()
    other.wait()
    assert path.exists()
    with locked(path):
        assert msgspec.json.decode(path.read_bytes(), type=Holder).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("holder", "taken"),
    [
        # The pid was given to another process since: this one is younger than the lock's.
        (Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time() - 1000), True),
        (Holder("another-host", 2**22 - 7, 0.0), False),
        (Holder("another-host", 2**22 - 7, 0.0, slurm_job=8), False),
        # Before this job was requeued.
        (Holder("another-host", 2**22 - 7, 0.0, slurm_job=7), True),
    ],
)
def test_who_is_gone(tmp_path, holder, taken):
    path = tmp_path / "launcher.lock"
    path.write_bytes(msgspec.json.encode(holder))
    if taken:
        with locked(path, slurm_job=7):
            pass
        assert not path.exists()
        return
    for job in (None, 7):
        with pytest.raises(ConfigError, match="another-host"), locked(path, job):
            pass


def test_the_lock_of_another_stays(tmp_path):
    path, other = tmp_path / "launcher.lock", msgspec.json.encode(Holder("another-host", 1, 0.0))
    with locked(path):
        path.write_bytes(other)  # the folder was removed meanwhile, and made again by another run
    assert path.read_bytes() == other
    _remove_stale(path, Holder("a-third-host", 1, 0.0))  # which held it before; the other was faster to take it
    assert path.read_bytes() == other and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_lock_is_not_taken(tmp_path):
    path = tmp_path / "launcher.lock"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="not a launcher's lock"), locked(path):
        pass
