"""The weight table: exact inverse, every tensor accounted for, shapes as transformers makes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.table import (
    canonical_name,
    check_names,
    from_shards,
    hf_names,
    hf_shapes,
    parameter_mappings,
    to_shard,
)
from tests.tiny import KINDS, hf_folder


def shape_of(
    family="Qwen2ForCausalLM", tied=False, heads=4, kv_heads=2, head_dim=8, hidden=16, ffn=24, vocab=32, layers=2
):
    experts = Experts(4, 2, 8, True) if FAMILIES[family].mixture else None
    return ModelShape(
        FAMILIES[family], layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied, 1e-6, 1e4, None, 64, experts
    )


@settings(deadline=None, max_examples=30)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tp=st.sampled_from([1, 2, 4]),
    kv_per_rank=st.integers(1, 2),
    q_per_kv=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6]),
    vocab=st.sampled_from([32, 33, 35]),
)
def test_shards_are_an_exact_inverse(family, tp, kv_per_rank, q_per_kv, head_dim, vocab):
    kv = tp * kv_per_rank
    shape = shape_of(family, heads=kv * q_per_kv, kv_heads=kv, head_dim=head_dim, vocab=vocab)
    for mapping in parameter_mappings(shape).values():
        tensors = [torch.randn(s) for s in hf_shapes(mapping, shape)]
        shards = [to_shard(mapping, shape, tensors, tp, rank) for rank in range(tp)]
        for tensor, back in zip(tensors, from_shards(mapping, shape, shards), strict=True):
            assert torch.equal(tensor, back), mapping


def test_qkv_is_interleaved_by_key_value_group():
    """By hand: 2 kv groups of 2 q heads, head_dim 1, hidden 1: rows q0 q1 k0 v0 | q2 q3 k1 v1."""
    shape = shape_of(heads=4, kv_heads=2, head_dim=1, hidden=1)
    mapping = parameter_mappings(shape)["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    assert to_shard(mapping, shape, [q, k, v], 1, 0)[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert to_shard(mapping, shape, [q, k, v], 2, 1)[:, 0].tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_split_together():
    shape = shape_of(ffn=4, hidden=1)
    mapping = parameter_mappings(shape)["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    assert to_shard(mapping, shape, [gate, up], 2, 1)[:, 0].tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_that_transformers_writes(tmp_path, kind, tied):
    path = hf_folder(tmp_path, kind, tied)
    shape = read_model(path)
    real = {n: tuple(t.shape) for n, t in load_file(path / "model.safetensors").items()}
    ours = {
        n: s
        for mapping in parameter_mappings(shape).values()
        for n, s in zip(mapping.hf, hf_shapes(mapping, shape), strict=True)
    }
    assert ours == real


def test_slices_of_two_ranks_by_hand():
    """8 heads in 4 groups, head size 3 (hidden / heads is 2), 2 ranks: every row, as attention takes it apart.

    Rank 0 holds groups 0 and 1, and of each its 2 query heads, its key head and its value head, 3 rows a head.
    """
    shape = shape_of(heads=8, kv_heads=4, head_dim=3, hidden=16)
    table, p = parameter_mappings(shape), "decoder.layers.0."
    q, k, v = torch.arange(24), torch.arange(12) + 100, torch.arange(12) + 200
    expected = [
        [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202, 6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205],
        [12, 13, 14, 15, 16, 17, 106, 107, 108, 206, 207, 208, 18, 19, 20, 21, 22, 23, 109, 110, 111, 209, 210, 211],
    ]
    wide = [t[:, None].expand(-1, 16) for t in (q, k, v)]
    for rank in (0, 1):
        assert (
            to_shard(table[p + "self_attention.linear_qkv.bias"], shape, [q, k, v], 2, rank).tolist() == expected[rank]
        )
        weight = to_shard(table[p + "self_attention.linear_qkv.weight"], shape, wide, 2, rank)
        assert weight[:, 5].tolist() == expected[rank] and weight.shape == (24, 16)
    # The output projection's columns follow the query heads: rank 1 has heads 4 to 7.
    proj = torch.arange(24).expand(16, -1)
    assert to_shard(table[p + "self_attention.linear_proj.weight"], shape, [proj], 2, 1)[3].tolist() == [*range(12, 24)]
    gate, up = torch.arange(24)[:, None].expand(-1, 16), torch.arange(24)[:, None].expand(-1, 16) + 100
    fc1 = to_shard(table[p + "mlp.linear_fc1.weight"], shape, [gate, up], 2, 1)
    assert fc1[:, 0].tolist() == [*range(12, 24), *range(112, 124)]


def test_a_vocabulary_that_the_ranks_do_not_divide_is_padded_by_zeros():
    """By hand: 5 entries over 2 ranks of 3 rows."""
    shape = shape_of(vocab=5, hidden=1)
    mapping = parameter_mappings(shape)["output_layer.weight"]
    slices = [to_shard(mapping, shape, [torch.arange(1.0, 6)[:, None]], 2, rank) for rank in (0, 1)]
    assert [s[:, 0].tolist() for s in slices] == [[1, 2, 3], [4, 5, 0]]
    assert from_shards(mapping, shape, slices)[0][:, 0].tolist() == [1, 2, 3, 4, 5]
    assert hf_shapes(mapping, shape) == [(5, 1)]


def test_missing_and_extra_tensors_are_named():
    shape = shape_of()
    names = hf_names(shape)
    check_names(names, shape, "here")
    with pytest.raises(ConfigError, match="1 tensors are missing: model.norm.weight"):
        check_names(names - {"model.norm.weight"}, shape, "here")
    with pytest.raises(ConfigError, match="not part of the model: model.vision.weight"):
        check_names(names | {"model.vision.weight"}, shape, "here")


def test_tied_head_in_the_file_is_accepted():
    shape = shape_of(tied=True)
    check_names(hf_names(shape) | {"lm_head.weight"}, shape, "here")


def test_canonical_names():
    assert canonical_name("decoder.layers.1.mlp.linear_fc2.weight", 4) == "decoder.layers.5.mlp.linear_fc2.weight"
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_name(fused, 0) == "decoder.layers.0.input_layernorm.weight"
    expert = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight".format
    assert canonical_name(expert(1), 0, first_expert=2) == expert(3)
