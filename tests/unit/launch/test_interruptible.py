"""A signal is not lost, whatever runs when it comes."""

import os
import signal
import subprocess
import sys

import pytest

from launch.processes import interruptible


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_where_its_exception_is_lost_the_check_raises_it_again():
    class Loses:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), interruptible() as check:
        check()
        Loses()
        reached = True
        check()
    assert reached


BLOCKED = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
from launch.attempt import asked_by_signals

os.kill(os.getpid(), signal.SIGUSR1)
with asked_by_signals({signal.SIGUSR1: "near"}) as asked:
    print(asked(), asked())
    os.kill(os.getpid(), signal.SIGUSR1)
    print(asked(), asked())
os.kill(os.getpid(), signal.SIGUSR1)
print("back into the queue", flush=True)
"""


def test_a_blocked_signal_is_heard_inside_the_block_alone():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, 2 * ["near None"] + ["back into the queue"]), done.stderr


def test_of_sigusr1_no_job_dies_while_it_starts(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/bash\nkill -USR1 $PPID\n")
    (tmp_path / "scontrol").chmod(0o755)
    # Numpy's threads must not take it either.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OPENBLAS_NUM_THREADS": "4", "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-W", "ignore", "-m", "launch.slurm", "--recipe", "nowhere.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode > 0 and "nowhere.yaml" in done.stderr, (done.returncode, done.stderr)
