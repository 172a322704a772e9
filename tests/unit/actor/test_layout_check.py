"""A model that does not fit the layout is refused with one line that names both numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.actor.layout_check import check_layout
from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape
from tests.tiny import run_config

SHAPE = ModelShape(FAMILIES["Qwen3ForCausalLM"], 6, 32, 64, 8, 4, 8, 100, False, 1e-6, 1e4, None, 40960)
MOE = replace(SHAPE, family=FAMILIES["Qwen3MoeForCausalLM"], experts=Experts(6, 2, 30, True))
OLMO2 = replace(SHAPE, family=FAMILIES["Olmo2ForCausalLM"])
TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"


@pytest.mark.parametrize(
    ("shape", "actor", "says"),
    [
        (SHAPE, {TP: 3}, "attention heads 8"),
        (SHAPE, {TP: 8}, "key-value heads 4"),
        (replace(SHAPE, vocab=6), {TP: 4}, "tensor_model_parallel_size=4 leaves a rank without one of the 6 tokens"),
        (replace(SHAPE, ffn=63), {TP: 2}, "intermediate size 63"),
        (SHAPE, {PP: 4}, "layers 6"),
        (SHAPE, {PP: 2, "virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=4"),
        (MOE, {EP: 2}, "must divide the 1 ranks"),
        (MOE, {EP: 2, TP: 3, "data_parallel_size": 3}, "must divide the 9 ranks"),
        (SHAPE, {EP: 2, "data_parallel_size": 2}, "has no experts"),
        (MOE, {EP: 4, "data_parallel_size": 4}, "experts 6"),
        (MOE, {TP: 4}, "experts' intermediate size 30"),
        (MOE, {TP: 2, "sequence_parallel": False}, "needs actor.sequence_parallel=true"),
        (replace(SHAPE, max_positions=256), {}, "max_position_embeddings=256"),
        (OLMO2, {"layer_spec": "transformer_engine"}, "Olmo2ForCausalLM has torch's layers only"),
        (replace(SHAPE, window=511), {}, "engine.context_length=512 exceeds the model's sliding_window=511"),
    ],
)
def test_misfits(shape, actor, says):
    with pytest.raises(ConfigError) as e:
        check_layout(run_config(Path("m"), actor=actor), shape)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("actor", [{TP: 4}, {TP: 2, EP: 2}, {PP: 3, "virtual_pipeline_model_parallel_size": 2}])
def test_fits(actor):
    shape = replace(MOE if EP in actor else SHAPE, window=512, vocab=101)
    check_layout(run_config(Path("m"), actor=actor), shape)
