"""A signal is not lost, whatever runs when it comes."""

import signal

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
