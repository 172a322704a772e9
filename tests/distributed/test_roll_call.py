"""A rank that hangs, though it beats, is named by the others: its number, its host, its phase."""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import BUILD
from tests.tiny import groups, hf_folder, packed_batch, run_config

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.config import AlgorithmConfig
from dapo_megatron.distributed.agreement import RanksMissing, all_agree
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.errors import DapoError
from dapo_megatron.process import Reporter
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer import roll_call
from dapo_megatron.trainer.roll_call import STORE_S, WAIT_S, is_of_a_collective, missing_ranks, missing_ranks_named

DEADLINE_S = 3


def agree(config):
    layout = init_parallel(config)

    def call():
        with all_agree("the save of step 7", layout):
            pass

    return call


def update(config):
    actor, batch = actor_on_rank(config), packed_batch(groups(), rules=packing_rules(config), **BUILD)
    shard = batch.mini_batches[0].shards[actor.layout.dp_rank]
    return lambda: actor.update(shard, PolicyObjective(AlgorithmConfig()), None)


def said(config, prepare, hung, run_dir):
    """What a rank says of the others; those that hang come when it is too late."""
    rank, folder = dist.get_rank(), RunFolder(run_dir)
    call = prepare(config)
    with Reporter(folder, f"trainer-{rank}") as reporter:
        reporter.phase("push" if rank in hung else "update")
        dist.barrier()
        if rank in hung:
            time.sleep(DEADLINE_S + WAIT_S + STORE_S + 0.5)
            return os.getpid()
        try:
            with missing_ranks_named(folder):
                call()
        except DapoError as e:
            return str(e)
    return "nothing"


@pytest.mark.parametrize(("world", "hung"), [(3, [0]), (4, [1, 3])])
def test_an_agreement(tmp_path: Path, world, hung):
    config = run_config(tmp_path, actor={"data_parallel_size": world}, trainer={"collective_timeout_s": DEADLINE_S})
    found = run_ranks(world, said, config, agree, hung, tmp_path / "run")
    host = socket.gethostname()
    names = ", ".join(f"trainer rank {rank} (pid {found[rank]} on {host}, in phase push)" for rank in hung)
    others = [text for rank, text in enumerate(found) if rank not in hung]
    assert all(text.endswith(f": {names} did not take part, and hangs or is gone") for text in others), others
    assert all(text.startswith("the save of step 7: not every trainer rank came") for text in others)


@pytest.mark.parametrize("parallel", ["data_parallel_size", "pipeline_model_parallel_size"])
def test_the_midst_of_an_update(tmp_path: Path, parallel):
    config = run_config(hf_folder(tmp_path), actor={parallel: 2}, trainer={"collective_timeout_s": DEADLINE_S})
    found = run_ranks(2, said, config, update, [1], tmp_path / "run")
    assert found[0].startswith("a collective failed (") and f"trainer rank 1 (pid {found[1]} on " in found[0]


@pytest.mark.parametrize(
    "error",
    [
        RanksMissing("the save: not every trainer rank came"),
        dist.DistBackendError("NCCL error: remote process exited"),
        dist.DistNetworkError("the client socket has timed out"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        RuntimeError("Application timeout caused pair closure"),
    ],
)
def test_what_says_that_others_are_not_there(error):
    assert is_of_a_collective(error)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ([], "all ranks are there: see logs/latest/trainer-*.log"),
        ([1], "trainer rank 1 did not take part, and hangs or is gone"),  # it has never said what it does
    ],
)
def test_what_is_said_is_one_line(tmp_path: Path, monkeypatch, missing, told):
    monkeypatch.setattr(roll_call, "missing_ranks", lambda: missing)
    with pytest.raises(DapoError) as e, missing_ranks_named(RunFolder(tmp_path)):
        raise RuntimeError("gloo:\n  " + 300 * "x")
    assert str(e.value) == f"a collective failed (gloo: {194 * 'x'}): {told}"


class Store:
    """Of three ranks; each of `comes` is there from its time on, by the clock of `now`. Gone, it answers nothing."""

    def __init__(self, monkeypatch, own, comes, is_gone=False):
        self.now, self.comes, self.is_gone, self.keys, self.timeout = 0.0, comes, is_gone, {}, timedelta(minutes=30)
        monkeypatch.setattr(roll_call, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(dist, "get_rank", lambda: own)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: self)
        monkeypatch.setattr(dist.distributed_c10d, "PrefixStore", lambda name, store: store)

    def sleep(self, seconds):
        self.now += seconds

    def set_timeout(self, timeout):
        self.timeout = timeout

    def set(self, key, value):
        if self.is_gone:
            self.sleep(self.timeout.total_seconds())
            raise dist.DistNetworkError("the connection is closed")
        self.keys[key] = value

    def check(self, keys):
        return all(key in self.keys or self.comes.get(int(key), WAIT_S + 1) <= self.now for key in keys)


def test_who_has_come_is_not_waited_for_and_the_first_rank_stays_for_the_others(monkeypatch):
    store = Store(monkeypatch, own=1, comes={0: 0.0, 2: 1.0})
    assert missing_ranks() == [] and "1" in store.keys and 1.0 <= store.now < 1.3
    store = Store(monkeypatch, own=0, comes={1: 1.0, 2: 0.0})
    assert missing_ranks() == [] and 1.0 + STORE_S <= store.now < 1.3 + STORE_S


def test_who_does_not_come_in_time_is_missing(monkeypatch):
    store = Store(monkeypatch, own=1, comes={0: 1.0})
    assert missing_ranks() == [2] and WAIT_S <= store.now < WAIT_S + 0.3


def test_where_the_store_is_gone_all_others_are_missing_at_its_deadline(monkeypatch):
    store = Store(monkeypatch, own=1, comes={}, is_gone=True)
    assert missing_ranks() == [0, 2] and store.now == WAIT_S


def test_another_error_stays_what_it_is(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shapes differ"), missing_ranks_named(RunFolder(tmp_path)):
        raise RuntimeError("shapes differ")
