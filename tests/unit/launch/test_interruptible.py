"""A signal is not lost, whatever runs when it comes."""

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


EARLY_AND_LATE = """
import os, signal
from launch import slurm
from launch.attempt import asked_by_signals

def begin(*_):
    os.kill(os.getpid(), signal.SIGUSR1)
    with asked_by_signals({signal.SIGUSR1: "near"}) as asked:
        print(asked(), asked())
        os.kill(os.getpid(), signal.SIGUSR1)
        print(asked(), asked())
    os.kill(os.getpid(), signal.SIGUSR1)
    print("back into the queue", flush=True)

slurm.begin = begin
slurm.app(["--recipe", "any.yaml"])
"""


def test_of_sigusr1_no_job_dies_while_it_starts_or_ends():
    done = subprocess.run([sys.executable, "-c", EARLY_AND_LATE], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, 2 * ["near None"] + ["back into the queue"]), done.stderr
