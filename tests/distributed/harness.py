"""Run a function on several gloo ranks: processes forked from one that has imported everything already."""

import gc
import multiprocessing
import os
import queue
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

from dapo_megatron.actor.actor import Actor
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.config import RunConfig
from dapo_megatron.weights.hf_config import read_model
from launch.ports import reserved_ports

DEADLINE_S = 120.0


def run_ranks(world: int, function, *args, deadline_s: float = DEADLINE_S) -> list:
    """[function(*args) of each rank]; results must be picklable.

    Raises:
        AssertionError: with the traceback of the rank that failed first, or the ranks that never answered.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with reserved_ports(1) as (port,):
        ranks = [context.Process(target=_rank, args=(r, world, port, function, args, answers)) for r in range(world)]
        for p in ranks:
            p.start()
        return _collect(ranks, answers, deadline_s)


def _collect(ranks: list, answers, deadline_s: float) -> list:
    world, results, end = len(ranks), {}, time.monotonic() + deadline_s
    try:
        while len(results) < world:
            try:
                rank, error, result = answers.get(timeout=0.2)
            except queue.Empty:
                late = time.monotonic() > end
                dead = [r for r, p in enumerate(ranks) if not p.is_alive() and r not in results and p.exitcode]
                if late or dead:
                    raise AssertionError(f"ranks without an answer: {set(range(world)) - set(results)}") from None
                continue
            if error:
                raise AssertionError(f"rank {rank} of {world}:\n{error}")
            results[rank] = result
    finally:
        for p in ranks:
            p.join(5 if len(results) == world else 0)
            if p.is_alive():
                p.kill()
                p.join()
    return [results[r] for r in range(world)]


def _rank(rank, world, port, function, args, answers):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    gc.freeze()  # or each collection goes through all that pytest holds, and copies it page by page
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_S))
        answers.put((rank, None, function(*args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
        raise


def actor_on_rank(config: RunConfig) -> Actor:
    """This rank's actor with the weights of config.model.path."""
    layout = init_parallel(config)
    actor = Actor(config, read_model(config.model.path), layout)
    actor.load_hf(config.model.path)
    return actor
