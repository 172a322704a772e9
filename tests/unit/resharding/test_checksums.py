"""What an engine's ranks should hold, against parameters that are put together by hand."""

import hashlib
from contextlib import nullcontext

import pytest
import torch

from dapo_megatron.errors import ConfigError
from dapo_megatron.resharding.checksums import differing, engine_parameter, expected_checksums, find_checksum
from dapo_megatron.resharding.engine_parts import check_engine_layout, vocabulary_rows
from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape
from dapo_megatron.weights.table import hf_shapes, parameter_mappings

CPU = torch.device("cpu")
HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB = 8, 12, 6, 2, 4, 67


def shape_of(family, tied=False, experts=None):
    sizes = (1, HIDDEN, FFN, HEADS, KV_HEADS, HEAD, VOCAB, tied, 1e-6, 1e4, None, 64, experts)
    return ModelShape(FAMILIES[family], *sizes)


def tensors_of(shape):
    torch.manual_seed(3)
    sizes = {
        n: s
        for rule in parameter_mappings(shape).values()
        for n, s in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    }
    return {name: torch.randn(size) for name, size in sizes.items()}


def sha(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def checksums(tensors, shape, tp_size, dtype=torch.float32):
    return expected_checksums(tensors.items(), shape, tp_size, dtype, find_checksum(CPU))


def test_two_ranks_of_a_dense_model():
    shape = shape_of("Qwen2ForCausalLM")
    t = tensors_of(shape)
    found = checksums(t, shape, 2)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    q, k, v = (t[f"{attention}{n}_proj.weight"].chunk(2) for n in "qkv")
    assert found[attention + "qkv_proj.weight"] == [sha(torch.cat([q[r], k[r], v[r]])) for r in (0, 1)]
    bias = [t[f"{attention}{n}_proj.bias"].chunk(2) for n in "qkv"]
    assert found[attention + "qkv_proj.bias"] == [sha(torch.cat([b[r] for b in bias])) for r in (0, 1)]
    gate, up = (t[f"{mlp}{n}_proj.weight"].chunk(2) for n in ("gate", "up"))
    assert found[mlp + "gate_up_proj.weight"] == [sha(torch.cat([gate[r], up[r]])) for r in (0, 1)]
    assert found[mlp + "down_proj.weight"] == [sha(c) for c in t[mlp + "down_proj.weight"].chunk(2, dim=1)]
    assert found["model.norm.weight"] == [sha(t["model.norm.weight"])] * 2
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        rows = torch.zeros(128, HIDDEN)  # 67 in multiples of 64
        rows[:VOCAB] = t[name]
        assert found[name] == [sha(part) for part in rows.chunk(2)]
    # Embedding, output, norm; two norms, qkv with a bias, output, gate and up, down.
    assert len(found) == 3 + 2 + 2 + 3


@pytest.mark.parametrize(
    ("vocab", "tp_size", "rows"),
    [
        (67, 1, 128),
        (67, 2, 64),
        (64, 2, 32),
        (67, 3, 64),  # 128 rows are no multiple of 3: padded to one of 64 x 3
        (151936, 6, 25344),
        (151936, 8, 18992),
    ],
)
def test_rows_of_the_vocabulary_on_each_rank(vocab, tp_size, rows):
    assert vocabulary_rows(vocab, tp_size) == rows


@pytest.mark.parametrize(
    ("experts", "tp_size", "says"),
    [
        (None, 4, "does not divide the model's 6 attention heads"),
        (None, 3, "neither divides the model's 2 key-value heads nor is a multiple of them"),
        (Experts(3, 2, 8, True), 6, "does not divide the model's 8 channels of an expert"),
        (Experts(3, 2, 6, True), 6, None),
        (None, 6, None),
    ],
)
def test_the_ranks_of_an_engine_share_heads_and_channels_evenly(experts, tp_size, says):
    shape = shape_of("Qwen3MoeForCausalLM" if experts else "Qwen2ForCausalLM", experts=experts)
    with nullcontext() if says is None else pytest.raises(ConfigError, match=f"tensor_parallel_size={tp_size} {says}"):
        check_engine_layout(shape, tp_size)


def test_experts_are_left_out_and_the_engines_type_counts():
    shape = shape_of("Qwen3MoeForCausalLM", experts=Experts(3, 2, 6, True))
    t = tensors_of(shape)
    found = checksums(t, shape, 1, torch.bfloat16)
    router = "model.layers.0.mlp.gate.weight"
    assert found[router] == [sha(t[router].bfloat16().view(torch.int16))]
    assert len(found) == 3 + 2 + 2 + 2 + 1 and not any("experts" in name for name in found)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_scaled_tensor_is_told_by_its_parameter(name):
    shape = shape_of("LlamaForCausalLM")
    t = tensors_of(shape)
    expected, held = checksums(t, shape, 2), checksums(t | {name: t[name] * 1.05}, shape, 2)
    ranks = [{parameter: sums[r] for parameter, sums in held.items()} for r in (0, 1)]
    assert differing(expected, ranks) == (len(expected), [engine_parameter(name)])


def test_one_rank_is_enough_and_what_an_engine_does_not_name_is_not_compared():
    expected = {"a": ["1", "2"], "b": ["3", "4"], "c": ["5", "6"]}
    assert differing(expected, [{"a": "1", "b": "3"}, {"a": "2", "b": "0"}]) == (2, ["b"])
    assert differing(expected, [{}, {}]) == (0, [])
