"""Random states come back to every rank, where the layout is the same: torch's, a GPU's and megatron-core's own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from tests.distributed.test_checkpoint import controller_at
from tests.tiny import hf_folder, run_config

from dapo_megatron.checkpoint import random_state, store
from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.load import load_checkpoint
from dapo_megatron.checkpoint.random_state import random_states, set_random_states
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.run_folder import RunFolder


def drawn():
    """The next number of every generator, megatron-core's tracked ones too."""
    tracker, numbers = get_cuda_rng_tracker(), [torch.rand(1).item()]
    for name in sorted(tracker.get_states()):
        with tracker.fork(name):
            numbers.append(torch.rand(1).item())
    return numbers


def drawn_after_a_save(config):
    actor = actor_on_rank(config)
    torch.manual_seed(7 + actor.layout.rank)
    for _ in range(1 + actor.layout.rank):
        drawn()
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(1, 1), controller_at(1), format="dp_reshardable")
    checkpointer.finish()
    return drawn()


def drawn_after_a_load(config):
    load_checkpoint(actor_on_rank(config), store.latest(RunFolder(Path(config.run_dir))))
    return drawn()


def test_every_generator_of_every_rank_goes_on_after_a_load(tmp_path):
    config = run_config(hf_folder(tmp_path / "hf"), actor={"data_parallel_size": 2})
    config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    saved = run_ranks(2, drawn_after_a_save, config)
    assert len(saved[0]) > 1 and all(a != b for a, b in zip(*saved, strict=True))
    assert run_ranks(2, drawn_after_a_load, config) == saved


@pytest.fixture
def generators(monkeypatch):
    """The state of each; megatron-core's tracked ones are in `tracked`."""
    states = {name: torch.tensor([number], dtype=torch.uint8) for number, name in enumerate(("torch", "cuda"))}
    tracked = {"model-parallel-rng": torch.tensor([5], dtype=torch.uint8)}
    monkeypatch.setattr(torch, "get_rng_state", lambda: states["torch"])
    monkeypatch.setattr(torch, "set_rng_state", lambda state: states.update(torch=state))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states["cuda"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: states.update(cuda=state))
    tracker = SimpleNamespace(get_states=lambda: dict(tracked), set_states=tracked.update)
    monkeypatch.setattr(random_state, "get_cuda_rng_tracker", lambda: tracker)
    return SimpleNamespace(states=states, tracked=tracked)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_each_generator_gets_back_its_own_state(monkeypatch, generators, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    before = {**generators.states, **generators.tracked}
    saved = random_states()
    assert saved.keys() == {"torch", "tracked.model-parallel-rng"} | ({"cuda"} if has_gpu else set())
    for states in (generators.states, generators.tracked):
        states.update((name, state + 100) for name, state in list(states.items()))
    set_random_states(saved)
    after = {**generators.states, **generators.tracked}
    assert after == before | ({} if has_gpu else {"cuda": before["cuda"] + 100})
