"""A bucket that does not arrive, on real gloo groups whose other rank does not take part."""

import time
from concurrent.futures import Future
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks

from dapo_megatron.engines.control import EngineControl
from dapo_megatron.errors import DapoError, EngineError
from dapo_megatron.resharding.broadcast import Broadcast
from dapo_megatron.resharding.fill import fill
from dapo_megatron.resharding import group as weight_group
from dapo_megatron.resharding.group import end_group
from dapo_megatron.resharding.plan import Bucket

URL, GLOO_S = "http://engine:1", 8
ROWS = 1 << 20  # more than a socket takes
BUCKET = Bucket(("a.weight", "b.weight"), ((ROWS, 4), (ROWS, 2)), "float32")


def flat():
    tensors = iter([("a.weight", torch.ones(ROWS, 4)), ("b.weight", torch.full((2, ROWS), 2.0).T)])
    return fill(BUCKET, tensors, torch.device("cpu"))


def answered(error=None):
    """An engine's answer that has come already."""
    load = Future()
    load.set_exception(error) if error else load.set_result(None)
    return [(EngineControl(URL, 1), load)]


def outcome(loads, receives, timeout_s=1):
    """(what the sender said, after how many seconds it and its group were done); what the receiver got."""
    group = dist.new_group(timeout=timedelta(seconds=GLOO_S))
    if dist.get_rank() == 1:
        got = torch.zeros(BUCKET.bytes, dtype=torch.uint8)
        if receives:
            dist.broadcast(got, src=0, group=group)
        dist.barrier()
        return got.view(torch.float32)[[0, 4 * ROWS - 1, 4 * ROWS, 6 * ROWS - 1]].tolist()
    began, said = time.monotonic(), None
    try:
        Broadcast(BUCKET, flat(), group, loads, timeout_s).wait()
    except EngineError as e:
        said = str(e)
    after = time.monotonic() - began
    dist.barrier()
    return said, after


def test_a_bucket_arrives():
    (said, _), got = run_ranks(2, outcome, answered(), True)
    assert said is None and got == [1, 1, 2, 2]


def test_the_deadline_is_not_the_backends():
    """The engine has answered, as under NCCL before the bytes are there; the collective is not over."""
    (said, after), got = run_ranks(2, outcome, answered(), False)
    assert said == f"bucket a.weight .. b.weight ({BUCKET.bytes} bytes) did not arrive at {URL} within 1 s: see " + (
        "logs/latest/engine-*.log"
    )
    assert 1 <= after < GLOO_S / 2 and got == [0, 0, 0, 0]


def test_a_refusal_is_told_at_once():
    (said, after), _ = run_ranks(2, outcome, answered(EngineError("no session")), False, 60)
    assert said.endswith(f"did not arrive at {URL}: no session") and after < GLOO_S / 2


def silent_engine():
    group = dist.new_group(timeout=timedelta(seconds=GLOO_S))
    began = time.monotonic()
    with pytest.raises(EngineError, match=f"did not arrive at {URL} within 1 s"):
        Broadcast(BUCKET, flat(), group, [(EngineControl(URL, 1), Future())], timeout_s=1).wait()
    return time.monotonic() - began


def test_an_engine_that_does_not_answer_is_named():
    """The collective is over at once, as in a group of one."""
    (after,) = run_ranks(1, silent_engine)
    assert 1 <= after < 5


def waits_for_a_group_that_ends():
    group = dist.new_group(timeout=timedelta(seconds=GLOO_S))
    dist.broadcast(torch.zeros(1), src=0, group=group)
    began = time.monotonic()
    if dist.get_rank() == 0:
        end_group(group)
        del group
        return time.monotonic() - began
    with pytest.raises(RuntimeError):
        dist.broadcast(torch.zeros(BUCKET.bytes), src=0, group=group)
    return time.monotonic() - began


def test_who_waits_in_a_group_that_ends_goes_on():
    assert max(run_ranks(2, waits_for_a_group_that_ends)) < GLOO_S / 2


@pytest.mark.parametrize(("backend", "seconds"), [("gloo", 30), ("nccl", 60)])
def test_the_watchdog_of_nccl_comes_after_the_senders_own_deadline(monkeypatch, backend, seconds):
    """It would end the whole process."""
    timeouts = []

    def made(*_, timeout, **options):
        timeouts.append(timeout)
        return "group", None

    monkeypatch.setattr(weight_group, "_new_process_group_helper", made)
    weight_group.join_as_sender("pushes", dist.HashStore(), 2, backend, 30)
    del dist.distributed_c10d._world.pg_group_ranks["group"]
    assert timeouts == [timedelta(seconds=seconds)]


def test_engines_elsewhere_are_given_an_address_that_leads_to_them(monkeypatch):
    towards = []

    class Probe(nullcontext):
        def __enter__(self):
            return SimpleNamespace(connect=towards.append, getsockname=lambda: ("10.0.0.1", 5))

    monkeypatch.setattr(weight_group.socket, "socket", lambda *_: Probe())
    assert weight_group.sender_address(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1" and not towards
    assert weight_group.sender_address(["http://10.0.0.2:1", "http://127.0.0.1:2"]) == "10.0.0.1"
    assert towards == [("10.0.0.2", 9)]


@pytest.mark.parametrize("names", [("b.weight", "a.weight"), ("a.weight",)])
def test_another_tensor_than_planned_is_refused(names):
    tensors = {"a.weight": torch.ones(ROWS, 4), "b.weight": torch.ones(ROWS, 2)}
    with pytest.raises(DapoError, match="the push plan expects"):
        fill(BUCKET, iter([(name, tensors[name]) for name in names]), torch.device("cpu"))
