"""Checkpoints: saved under one layout, resumed under another, with optimizer and schedule; and published atomically."""

from pathlib import Path

import pytest

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import LAYOUTS, step_batch
from tests.tiny import hf_folder, run_config

from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.load import load_checkpoint
from dapo_megatron.data.sampler import SamplerState
from dapo_megatron.data.snapshot import Snapshot, encode_snapshot
from dapo_megatron.errors import DapoError
from dapo_megatron.run_folder import RunFolder


def updates(config, actor, count):
    batch = step_batch(config, 1000)
    shards = [m.shards[actor.layout.dp_rank] for m in batch.mini_batches]
    return [actor.update(shards[i % 2], PolicyObjective(config.algorithm), None) for i in range(count)]


def on_first(actor, data):
    return data if actor.layout.rank == 0 else b""


def controller_at(step):
    """The controller's state that belongs to a step."""
    return encode_snapshot(Snapshot(step, SamplerState(0, 0, step, 9, True), step, (1.0, 2.0), [], []))


def two_steps_and_save(config, format="fully_reshardable"):
    actor = actor_on_rank(config)
    updates(config, actor, 2)
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(1, 7, 2), on_first(actor, controller_at(1)), format=format)
    after = updates(config, actor, 3)
    checkpointer.finish()
    return after


def resume(config):
    actor = actor_on_rank(config)
    state, controller = load_checkpoint(actor, store.latest(RunFolder(Path(config.run_dir))))
    assert (state, controller) == (TrainState(1, 7, 2), on_first(actor, controller_at(1)))
    return state.step, updates(config, actor, 3)


def config_for(tmp_path, path, layout, dtype="float32"):
    # 8 warm-up updates: the resume falls into the middle of the warm-up
    return run_config(path, actor=LAYOUTS[layout], optimizer={"warmup_steps": 4}, model={"dtype": dtype}).model_copy(
        update={"run_dir": str(tmp_path / "run")}
    )


ELSEWHERE = {
    "cp2": {"context_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2_ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "one": {},
}


@pytest.mark.parametrize(
    ("kind", "saved", "resumed"),
    [
        ("qwen3", "vpp2", "cp2"),
        ("qwen3", "cp2", "vpp2"),
        ("qwen3_moe", "ep2", "tp2_ep2"),
        ("qwen3_moe", "tp2_ep2", "one"),
        ("qwen3_moe", "one", "ep2"),
    ],
)
def test_resume_across_model_chunks_and_experts(tmp_path, kind, saved, resumed):
    path = hf_folder(tmp_path / "hf", kind, tied=True, layers=4)

    def config(layout):
        made = run_config(path, actor=ELSEWHERE[layout], optimizer={"warmup_steps": 4})
        return made.model_copy(update={"run_dir": str(tmp_path / "run")})

    expected = run_ranks(config(saved).world_size, two_steps_and_save, config(saved))[0]
    _, got = run_ranks(config(resumed).world_size, resume, config(resumed))[0]
    for g, e in zip(got, expected, strict=True):
        for key in ("policy/loss", "optimizer/grad_norm", "optimizer/lr", "policy/entropy"):
            assert g[key] == pytest.approx(e[key], rel=2e-4, abs=2e-6), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_in_any_layout_continues(tmp_path, dtype):
    path = hf_folder(tmp_path / "hf", "qwen3", tied=True)
    expected = run_ranks(2, two_steps_and_save, config_for(tmp_path, path, "tp2_sp", dtype))[0]
    assert [m["optimizer/lr"] for m in expected] == pytest.approx([1e-3 * k / 8 for k in (3, 4, 5)])
    for layout in ("tp2_sp", "pp2", "dp2", "one") if dtype == "float32" else ("tp2_sp",):
        config = config_for(tmp_path, path, layout, dtype)
        step, got = run_ranks(config.world_size, resume, config)[0]
        assert step == 1
        for g, e in zip(got, expected, strict=True):
            for key in ("policy/loss", "optimizer/grad_norm", "optimizer/lr", "policy/entropy"):
                assert g[key] == pytest.approx(e[key], rel=2e-4, abs=2e-6), (layout, key)


def resume_with_other_options(config):
    actor = actor_on_rank(config)
    load_checkpoint(actor, store.latest(RunFolder(Path(config.run_dir))))
    rates = [metrics["optimizer/lr"] for metrics in updates(config, actor, 3)]
    groups = [g for g in actor.optimizer.param_groups if g["params"]]
    return rates, [(g["betas"], g["eps"], g["weight_decay"], g["step"]) for g in groups]


def test_a_resume_takes_the_optimizers_options_as_they_are_now(tmp_path):
    """2 updates were done, with a warm-up of 8 to 1e-3; now it is one of 4 to 5e-4."""
    path = hf_folder(tmp_path / "hf", "qwen3", tied=True)
    config = config_for(tmp_path, path, "dp2")
    run_ranks(2, two_steps_and_save, config)
    other = {"lr": 5e-4, "warmup_steps": 2, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=other)})
    for rates, groups in run_ranks(2, resume_with_other_options, config):
        assert rates == pytest.approx([5e-4 * 3 / 4, 5e-4, 5e-4])
        assert groups and all(group[:2] == ((0.8, 0.9), 1e-6) and group[3] == 5 for group in groups)
        assert {group[2] for group in groups} == {0.0, 0.3}


@pytest.mark.parametrize(
    ("kind", "tied", "layouts"),
    [
        ("qwen3", True, ("tp2_sp", "one", "pp2")),
        ("qwen3", False, ("one", "tp2_sp", "pp2")),
        ("olmo2", False, ("tp2_sp", "one", "pp2")),
    ],
)
def test_a_padded_vocabulary_and_post_norms_resume_elsewhere(tmp_path, kind, tied, layouts):
    """67 entries: 68 rows under tensor parallelism, in the weights and in the optimizer's moments."""
    path = hf_folder(tmp_path / "hf", kind, tied, vocab=67)
    config = config_for(tmp_path, path, layouts[0])
    expected = run_ranks(config.world_size, two_steps_and_save, config)[0]
    for layout in layouts:
        config = config_for(tmp_path, path, layout)
        _, got = run_ranks(config.world_size, resume, config)[0]
        for g, e in zip(got, expected, strict=True):
            for key in ("policy/loss", "optimizer/grad_norm", "optimizer/lr", "policy/entropy"):
                assert g[key] == pytest.approx(e[key], rel=2e-4, abs=2e-6), (layout, key)


def load_of_other_model(config, path):
    actor = actor_on_rank(config)
    try:
        load_checkpoint(actor, path)
    except DapoError as e:
        return str(e)


def test_other_model_is_refused(tmp_path):
    config = config_for(tmp_path, hf_folder(tmp_path / "a", "qwen3"), "one")
    run_ranks(1, two_steps_and_save, config)
    other = config_for(tmp_path, hf_folder(tmp_path / "b", "llama"), "one")
    (message,) = run_ranks(1, load_of_other_model, other, store.latest(RunFolder(tmp_path / "run")))
    assert "holds a model with family=Qwen3ForCausalLM, the run's has LlamaForCausalLM" in message
