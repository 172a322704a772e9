"""A rank that hangs, though it beats, is named by the others: its number, its host, its phase."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import BUILD
from tests.tiny import groups, hf_folder, packed_batch, run_config

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.config import AlgorithmConfig
from dapo_megatron.distributed.agreement import all_agree
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.errors import DapoError
from dapo_megatron.process import Reporter
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer.roll_call import STORE_S, WAIT_S, missing_ranks_named

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


def test_another_error_stays_what_it_is(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shapes differ"), missing_ranks_named(RunFolder(tmp_path)):
        raise RuntimeError("shapes differ")
