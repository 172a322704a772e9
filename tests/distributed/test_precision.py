"""What FP8 asks of the actor and can be checked without it: padding, and masters more exact than the parameters."""

import contextlib
import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.tiny import groups, hf_folder, packed_batch, run_config

from dapo_megatron.actor.model import transformer_config
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.resharding.verify import scored_sample
from dapo_megatron.weights import importer
from dapo_megatron.weights.exporter import export_stage
from tests.unit.actor.test_precision import SHAPE, fp8_config


def update(config, total_multiple):
    """Metrics of one update and the weights after it."""
    actor = actor_on_rank(config)
    rules = PackingRules(data_parallel_size=1, micro_batch_tokens=256, total_multiple=total_multiple)
    batch = packed_batch(
        groups(),
        step=1,
        version=0,
        seed=0,
        mini_batch_groups=4,
        aggregation="token",
        rules=rules,
    )
    (shard,) = shard_samples([scored_sample(0, [5, 9, 13, 2, 7])], rules)
    prompt = actor.logprobs(shard)
    metrics = actor.update(batch.mini_batches[0].shards[0], PolicyObjective(config.algorithm), None)
    weights = {name: tensor.numpy().copy() for name, tensor in export_stage(actor.modules, actor.shape)}
    return prompt[0].tolist(), metrics, weights


@pytest.mark.parametrize("tp", [1, 2])
def test_padding_to_fp8_blocks_changes_nothing(tmp_path, tp):
    config = run_config(hf_folder(tmp_path), actor={"tensor_model_parallel_size": tp})
    plain_ranks, padded_ranks = (run_ranks(tp, update, config, multiple) for multiple in (tp, 128 * tp))
    # Which rank evaluates a label depends on the padding; all labels together do not.
    scored = [sorted(value for rank in ranks for value in rank[0]) for ranks in (plain_ranks, padded_ranks)]
    assert len(scored[0]) == 4
    np.testing.assert_allclose(*scored, atol=1e-5)
    plain, padded = plain_ranks[0], padded_ranks[0]
    for key, value in plain[1].items():
        assert padded[1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for name, value in plain[2].items():
        np.testing.assert_allclose(padded[2][name], value, atol=2e-6, err_msg=name)


def masters(config, parameters_lose_precision):
    """{name: float32 master} of the first layer's output projection and the final norm; one rank holds them whole."""
    if parameters_lose_precision:
        importer.is_float8tensor = lambda tensor: True  # in this process only: bfloat16 stands in for FP8
    actor = actor_on_rank(config)
    named = importer.named_parameters(actor.modules, actor.shape)
    names = ("decoder.layers.0.self_attention.linear_proj.weight", "decoder.final_layernorm.weight")
    return {name: named[name].main_param.view(named[name].shape).numpy().copy() for name in names}


def test_masters_start_from_the_checkpoint_and_not_from_rounded_parameters(tmp_path):
    path = hf_folder(tmp_path)
    config = run_config(path, model={"dtype": "bfloat16"})
    original = load_file(path / "model.safetensors")
    tensors = [original["model.layers.0.self_attn.o_proj.weight"], original["model.norm.weight"]]
    (exact,) = run_ranks(1, masters, config, True)
    for master, tensor in zip(exact.values(), tensors, strict=True):
        np.testing.assert_array_equal(master, tensor)
        assert (master != tensor.bfloat16().float().numpy()).any()
    (rounded,) = run_ranks(1, masters, config, False)
    for master, tensor in zip(rounded.values(), tensors, strict=True):
        np.testing.assert_array_equal(master, tensor.bfloat16().float())


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is installed")
def test_megatron_core_alone_would_train_in_bfloat16_without_a_word():
    from megatron.core.fp8_utils import get_fp8_context

    config = fp8_config("blockwise")
    mcore = transformer_config(config.actor, config.precision, SHAPE, torch.bfloat16)
    assert (mcore.fp8, mcore.fp8_recipe) == ("e4m3", "blockwise")
    assert isinstance(get_fp8_context(mcore), contextlib.nullcontext)
