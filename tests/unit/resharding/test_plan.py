"""The plan of a push, followed with numbered elements: in any layout every engine gets its part, exactly once."""

from functools import cache
from itertools import product
from math import prod

import pytest
import torch

from dapo_megatron.config import ActorConfig, EngineConfig
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.errors import ConfigError
from dapo_megatron.resharding.engine_parts import engine_parts
from dapo_megatron.resharding.plan import plan_buckets, plan_push
from dapo_megatron.weights.families import FAMILIES, Experts, ModelShape
from dapo_megatron.weights.table import from_shards, hf_names, hf_shapes, parameter_mappings, to_shard

HEADS, LAYERS, VOCAB = 12, 6, 67
BUCKET = 6000
MODELS = [
    ("Qwen2ForCausalLM", True, 12),
    ("Qwen2ForCausalLM", False, 4),
    ("Qwen3ForCausalLM", True, 2),
    ("Olmo2ForCausalLM", False, 12),
    ("Qwen3MoeForCausalLM", False, 4),
]


def shape_of(family, tied, kv_heads):
    experts = Experts(6, 2, 12, True) if FAMILIES[family].mixture else None
    sizes = (LAYERS, 8, 24, HEADS, kv_heads, 2, VOCAB, tied, 1e-6, 1e4, None, 64, experts)
    return ModelShape(FAMILIES[family], *sizes)


@cache
def numbered(shape):
    """Every tensor of the model; no two elements have the same number."""
    tensors, first = {}, 0
    for mapping in parameter_mappings(shape).values():
        for name, size in zip(mapping.hf, hf_shapes(mapping, shape), strict=True):
            if name not in tensors:
                tensors[name] = torch.arange(first, first + prod(size)).reshape(size)
                first += prod(size)
    return tensors


def gathered(gather, shape, actor):
    """What the sender makes of the shards of all ranks: those of the first parameter, then of the next."""
    tp = actor.tensor_model_parallel_size
    if gather.mappings[0].expert is not None:
        tp = expert_tensor_parallel_size(actor)
    assert gather.ranks == tp * len(gather.mappings)
    for mapping in gather.mappings:
        whole = [numbered(shape)[name] for name in mapping.hf]
        shards = [to_shard(mapping, shape, whole, tp, rank) for rank in range(tp)]
        assert {shard.numel() * 2 for shard in shards} == {gather.shard_bytes}
        yield from zip(mapping.hf, from_shards(mapping, shape, shards), strict=True)


def broadcast(stage, shape, actor):
    """{name: tensor} as it leaves the sender, cut out of the flat buckets; a tensor that comes twice is an error."""
    tensors = [pair for gather in stage.gathers for pair in gathered(gather, shape, actor)]
    assert [(name, tuple(t.shape)) for name, t in tensors] == [t for g in stage.gathers for t in g.tensors]
    flat, received = torch.cat([t.reshape(-1) for _, t in tensors]), {}
    assert stage.bytes == flat.numel() * 2
    for bucket in stage.buckets:
        assert bucket.bytes <= BUCKET or len(bucket.names) == 1
        for name, size in zip(bucket.names, bucket.shapes, strict=True):
            assert name not in received
            received[name], flat = flat[: prod(size)].reshape(size), flat[prod(size) :]
    assert not flat.numel()
    return received


def layouts(shape):
    for tp, pp, vpp, ep in product((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2, 3)):
        fits = not (shape.kv_heads % tp or LAYERS % (pp * vpp) or (vpp > 1 and pp == 1))
        if fits and (ep == 1 or shape.experts is not None) and tp * pp <= 12:
            yield ActorConfig(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                expert_model_parallel_size=ep,
                data_parallel_size=ep,
            )


def planned(shape, actor, engine_tp, engines, **options):
    engine = EngineConfig(tensor_parallel_size=engine_tp, replicas=engines)
    types = {"dtype": "bfloat16", "engine_dtype": "bfloat16", "bucket_bytes": BUCKET} | options
    return plan_push(shape, actor, engine, **types)


def keeps(shape, engine_tp):
    return shape.kv_heads % engine_tp == 0 or engine_tp % shape.kv_heads == 0


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_every_engine_gets_every_byte_exactly_once(model):
    shape = shape_of(*model)
    whole, seen = numbered(shape), 0
    for actor in layouts(shape):
        sent = None
        for engine_tp, engines in product((1, 2, 3, 4), (1, 2, 3)):
            if not keeps(shape, engine_tp):
                continue
            plan = planned(shape, actor, engine_tp, engines)
            if sent is None:  # the engines change nothing of what leaves the senders
                sent = [broadcast(stage, shape, actor) for stage in plan.stages]
            received = receive(plan, sent, engine_tp, engines)
            for rank in received:
                assert rank.keys() == whole.keys() == hf_names(shape)
                assert all(torch.equal(rank[name], whole[name]) for name in whole)
            seen += 1
    assert seen >= 60


def receive(plan, sent, engine_tp, engines):
    """What arrives at every rank of every engine, along the plan's links; nothing arrives twice."""
    ranks = [{} for _ in range(engine_tp * engines)]
    for stage, tensors in enumerate(sent):
        links = [link for link in plan.links if link.stage == stage]
        assert [link.engine for link in links] == list(range(engines))
        members = [rank for link in links for rank in link.ranks]
        assert members == list(range(1, 1 + engine_tp * engines))  # all but the sender, once
        for link in links:
            assert link.bytes == plan.stages[stage].bytes
            for rank in link.ranks:
                assert not ranks[rank - 1].keys() & tensors.keys()
                ranks[rank - 1] |= tensors
    return ranks


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("engine_tp", [1, 2, 3, 4])
def test_the_ranks_of_an_engine_share_every_tensor(model, engine_tp):
    shape = shape_of(*model)
    if not keeps(shape, engine_tp):
        with pytest.raises(ConfigError, match=f"engine.tensor_parallel_size={engine_tp} neither divides"):
            planned(shape, ActorConfig(), engine_tp, 1)
        return
    kept = [0] * engine_tp
    for mapping in parameter_mappings(shape).values():
        if mapping.megatron == "output_layer.weight" and shape.tied:
            continue
        for i, (name, size) in enumerate(zip(mapping.hf, hf_shapes(mapping, shape), strict=True)):
            held = torch.zeros(size, dtype=torch.int)
            for rank in range(engine_tp):
                part = engine_parts(mapping, shape, engine_tp, rank)[i]
                held[part] += 1
                kept[rank] += numbered(shape)[name][part].numel() * 2
            copies = {"whole": engine_tp, "slice": engine_tp}.get(mapping.kind, 1)
            if mapping.kind == "qkv" and i > 0:
                copies = max(1, engine_tp // shape.kv_heads)
            assert held.unique().tolist() == [copies], (name, engine_tp)
    assert planned(shape, ActorConfig(), engine_tp, 2).kept == tuple(kept)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "engine_tp"), [(8, 2, 1), (8, 2, 2), (8, 2, 4), (8, 2, 8), (6, 3, 6), (4, 1, 4), (12, 4, 2)]
)
def test_each_rank_has_the_keys_and_values_of_its_queries(heads, kv_heads, engine_tp):
    sizes = (1, 8, 24, heads, kv_heads, 4, 64, True, 1e-6, 1e4, None, 64)
    shape = ModelShape(FAMILIES["LlamaForCausalLM"], *sizes)
    (rule,) = (m for m in parameter_mappings(shape).values() if m.kind == "qkv")
    for rank in range(engine_tp):
        q, k, v = (
            [row // 4 for row in range(rows.start, rows.stop, 4)]
            for rows, _ in engine_parts(rule, shape, engine_tp, rank)
        )
        assert q == list(range(rank * heads // engine_tp, (rank + 1) * heads // engine_tp))
        assert k == v == sorted({head // (heads // kv_heads) for head in q})


def test_by_hand():
    """One layer's worth of arithmetic: Llama, hidden 8, 2 heads of 4, ffn 16, vocabulary 10, TP 2, PP 2."""
    shape = ModelShape(FAMILIES["LlamaForCausalLM"], 2, 8, 16, 2, 2, 4, 10, False, 1e-6, 1e4, None, 64)
    actor = ActorConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    plan = planned(shape, actor, 2, 3, dtype="float32", bucket_bytes=1 << 20)
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k, v, o; gate, up, down; two norms
    first, second = plan.stages
    assert first.bytes == 2 * (80 + layer) and second.bytes == 2 * (80 + layer + 8)
    assert plan.bytes == first.bytes + second.bytes and plan.engine_peak == second.bytes
    # Halves of the matrices, in float32, and the whole of each norm.
    assert first.contributed(experts=False) == 4 * (40 + (layer - 16) // 2 + 16) and not first.contributed(experts=True)
    assert plan.gathered == first.contributed(experts=False) + second.contributed(experts=False)
    # The bucket in bfloat16; in float32 the other rank's shards, a copy of the sender's own, and q, k and v joined and
    # taken apart.
    own = first.contributed(experts=False)
    assert first.sender_peak == first.bytes + 2 * own + 2 * 4 * (3 * 8 * 8)
    # The slower of the two counts: half of a matrix in float32 has the bytes of all of it in bfloat16.
    assert plan.seconds(1000.0, 500.0) == plan.gathered / 500 > plan.bytes / 1000
    assert plan.seconds(1000.0, 5000.0) == plan.bytes / 1000


def test_a_bucket_may_be_full():
    tensors = [(name, (10,)) for name in "abcdefg"]
    assert [bucket.names for bucket in plan_buckets(tensors, "bfloat16", 60)] == [
        ("a", "b", "c"),
        ("d", "e", "f"),
        ("g",),
    ]
    assert [len(bucket.names) for bucket in plan_buckets(tensors, "bfloat16", 59)] == [2, 2, 2, 1]


def test_a_tensor_beyond_the_bucket_stands_alone():
    shape = shape_of(*MODELS[0])
    plan = planned(shape, ActorConfig(), 1, 1, bucket_bytes=100)
    sizes = [(bucket.bytes, len(bucket.names)) for bucket in plan.stages[0].buckets]
    assert any(size > 100 for size, _ in sizes) and all(count == 1 for size, count in sizes if size > 100)
