"""What runs beside: its result, its error, and a deadline for whoever waits."""

import threading

import pytest

from dapo_megatron.checkpoint.background import BackgroundCall
from dapo_megatron.errors import StorageError


def test_the_result_is_waited_for():
    go = threading.Event()
    call = BackgroundCall("writing the checkpoint", lambda: go.wait() and 7)
    assert not call.is_done
    with pytest.raises(StorageError, match=r"^writing the checkpoint takes more than checkpoint.timeout_s=0.05 s"):
        call.result(0.05)
    go.set()
    assert call.result(10.0) == 7 and call.result(0.0) == 7 and call.is_done


def test_an_error_is_that_of_whoever_waits():
    def fails():
        raise KeyError("a")

    call = BackgroundCall("writing", fails)
    with pytest.raises(KeyError, match="a"):
        call.result(10.0)
    assert call.is_done


def test_a_process_that_has_to_go_does_not_wait_for_it():
    go = threading.Event()
    BackgroundCall("writing to a disk that hangs", go.wait)
    (thread,) = [t for t in threading.enumerate() if t.name == "writing to a disk that hangs"]
    assert thread.daemon
    go.set()
