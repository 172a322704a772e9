"""The memory plan by hand; tests/distributed/test_memory.py holds it against counted bytes."""

from dataclasses import replace

import pytest

from dapo_megatron.actor.memory import (
    StageMemory,
    fullest,
    layer_activations,
    longest_micro_batch,
    stage_parameters,
    trainer_memory,
)
from dapo_megatron.checkpoint.size import save_bytes, weight_elements
from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape
from tests.tiny import run_config

GIB = 2**30
QWEN_32B = ModelShape(FAMILIES["Qwen2ForCausalLM"], 64, 5120, 27648, 40, 8, 128, 152064, False, 1e-6, 1e6, None, 131072)
QWEN_30B_A3B = ModelShape(
    FAMILIES["Qwen3MoeForCausalLM"],
    48, 2048, 6144, 32, 4, 128, 151936, False, 1e-6, 1e6, None, 40960, Experts(128, 8, 768, True),
)  # fmt: skip
TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"


def config(dp=1, budget=16384, **actor):
    return run_config(
        "m",
        model={"dtype": "bfloat16"},
        actor={TP: 8, PP: 2, "data_parallel_size": dp, "micro_batch_tokens": budget} | actor,
        data={"max_prompt_tokens": 2048},
        rollout={"max_response_tokens": 20480},
        engine={"context_length": 32768},
    )


@pytest.mark.parametrize(("dp", "optimizer"), [(1, 22.9), (4, 5.7), (8, 2.9)])
def test_32b(dp, optimizer):
    first = trainer_memory(config(dp), QWEN_32B)[0]
    assert first.parameters / GIB == pytest.approx(3.8, abs=0.05)
    assert first.gradients / GIB == pytest.approx(7.6, abs=0.05)
    assert first.optimizer / GIB == pytest.approx(optimizer, abs=0.05)


def test_activations_of_32b():
    """Two micro-batches of one sequence of 22,528 tokens are in flight on stage 0."""
    rows = 22528
    hidden = rows // 8 * 5120 * 2
    layer = 4 * hidden + 2 * (rows // 8) * 4  # inputs of two norms and what comes out of them
    layer += rows * (2 * 5 * 128 + 2 * 128 + 4 * 128 + 5 * 27648 // 8) * 2 + rows * 5 * 4
    none = trainer_memory(config(), QWEN_32B)
    assert none[0].activations == 2 * 32 * layer + rows * 9
    full = trainer_memory(config(recompute=True), QWEN_32B)
    assert full[0].activations == 2 * 32 * hidden + layer - hidden + rows * 9
    assert none[0].activations / GIB == pytest.approx(58.8, abs=0.1)
    assert full[0].activations / GIB == pytest.approx(1.7 + 0.9, abs=0.1)
    assert fullest(none).stage == 0


def test_the_loss_of_32b():
    """Of 22,528 gathered rows the hidden states, their gradient and its float32 sum; of an eighth of the vocabulary the
    weight's gradient, and a chunk of logits in float32 and in bfloat16; on the last stage alone."""
    first, last = trainer_memory(config(loss_chunk_tokens=1024), QWEN_32B)
    slice_ = 152064 // 8
    assert first.loss == 0
    assert last.loss == 22528 * 5120 * (2 + 2 + 4) + slice_ * 5120 * 2 + 1024 * slice_ * (4 + 2)


def test_the_peak_is_in_an_update_or_in_a_save():
    parts = {"parameters": 1, "gradients": 2, "optimizer": 4, "activations": 8}
    assert StageMemory(0, **parts, work=16, loss=32, gather=39).peak == 7 + 8 + 32
    assert StageMemory(0, **parts, work=32, loss=16, gather=39).peak == 7 + 8 + 32
    assert StageMemory(0, **parts, work=16, loss=32, gather=41).peak == 7 + 41


def test_a_save_of_32b():
    """8 ranks a node, DP 4: 9.5 GiB of each GPU, and 375 GB of host memory beside the copies."""
    assert trainer_memory(config(4), QWEN_32B)[0].gather / GIB == pytest.approx(9.5, abs=0.1)
    save = save_bytes(config(4), QWEN_32B)
    assert 8 * save.gather / 1e9 == pytest.approx(375, rel=0.01)
    assert save.disk == weight_elements(QWEN_32B) * 14 == 32763876352 * 14


def test_experts_are_spread():
    for ep in (1, 2, 4, 8):
        actor = config(dp=2, **{TP: 4, PP: 1, EP: ep}).actor
        each = 3 * 2048 * 768
        assert stage_parameters(actor, QWEN_30B_A3B, 0).experts == 48 * 128 * each // (4 if ep == 1 else ep)


@pytest.mark.parametrize(("ep", "rows", "width"), [(1, 1024, 768 // 4), (8, 256, 768)])
def test_what_one_more_expert_of_each_token_keeps(ep, rows, width):
    """Of 1,024 tokens over TP 4 a rank routes 256. Experts that are spread are whole and get as many on the average;
    others are cut in four, and work on the tokens of all four ranks."""
    actor = config(dp=2, **{TP: 4, PP: 1, EP: ep}).actor
    nine = replace(QWEN_30B_A3B, experts=Experts(128, 9, 768, True))
    kept = [layer_activations(actor, shape, 1024, 2, fused=True) for shape in (QWEN_30B_A3B, nine)]
    assert kept[1] - kept[0] == 256 * (2 * 8 + 4) + rows * (2048 * 2 + 6 * width * 2 + 4)


@pytest.mark.parametrize(
    ("budget", "actor", "tokens"),
    [
        (16384, {}, 22528),  # the longest sequence stands alone
        (30001, {}, 30008),  # a multiple of TP
        (22528, {"context_parallel_size": 4}, 5632),
        (22530, {"context_parallel_size": 4}, 5632 + 8),  # 8 sequence parts, each a multiple of TP
    ],
)
def test_the_longest_micro_batch(budget, actor, tokens):
    assert longest_micro_batch(config(budget=budget, **actor)) == tokens
