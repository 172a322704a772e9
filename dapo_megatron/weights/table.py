"""The one table between Hugging Face tensors and Megatron parameters, and the pure layout changes it names.

Used by import, export and resharding alike. A mapping says which Hugging Face tensors make one Megatron parameter and
how that parameter is split over tensor-parallel ranks. Megatron fuses q, k, v into one matrix, interleaved by key-value
group (megatron-core attention.py, get_query_key_value_tensors), and gate, up into one, each rank holding its slice of
both (megatron-core mlp.py, gated_linear_unit).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import ModelShape

Kind = Literal["whole", "slice", "rows", "columns", "qkv", "gate_up"]


@dataclass(frozen=True)
class ParameterMapping:
    """One Megatron parameter of one layer (or of the model), with its Hugging Face tensors in order."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    expert: int | None = None
    """Number of the expert it belongs to: split over the expert tensor-parallel ranks, held by one EP rank."""


def parameter_mappings(shape: ModelShape) -> dict[str, ParameterMapping]:
    """Every parameter of the model by its Megatron name with the model-wide layer number.

    With tied embeddings `output_layer.weight` (it exists on the last pipeline stage) reads the embedding too. The
    largest come last: a push gathers them while others are under way.
    """
    table: list[ParameterMapping] = []
    for i in range(shape.layers):
        table += _layer_mappings(shape, f"decoder.layers.{i}.", f"model.layers.{i}.")
    table += [
        ParameterMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows"),
        ParameterMapping("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
        ParameterMapping(
            "output_layer.weight", ("model.embed_tokens.weight" if shape.tied else "lm_head.weight",), "rows"
        ),
    ]
    return {mapping.megatron: mapping for mapping in table}


def _layer_mappings(shape: ModelShape, m: str, h: str) -> list[ParameterMapping]:
    attention, mlp = h + "self_attn.", h + "mlp."
    qkv = (attention + "q_proj", attention + "k_proj", attention + "v_proj")
    out = [
        ParameterMapping(m + "self_attention.linear_qkv.weight", tuple(n + ".weight" for n in qkv), "qkv"),
        ParameterMapping(m + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), "columns"),
    ]
    if shape.family.post_norm:
        norms = [("self_attention.linear_proj.norm", "post_attention"), ("mlp.linear_fc2.norm", "post_feedforward")]
    else:
        norms = [("input_layernorm", "input"), ("pre_mlp_layernorm", "post_attention")]
    out += [
        ParameterMapping(f"{m}{ours}.weight", (f"{h}{theirs}_layernorm.weight",), "whole") for ours, theirs in norms
    ]
    if shape.experts is None:
        out += _mlp_mappings(m + "mlp.", mlp, None)
    else:
        out.append(ParameterMapping(m + "mlp.router.weight", (mlp + "gate.weight",), "whole"))
        for e in range(shape.experts.count):
            out += _mlp_mappings(f"{m}mlp.experts.local_experts.{e}.", f"{mlp}experts.{e}.", e)
    if shape.family.qkv_bias:
        out.append(ParameterMapping(m + "self_attention.linear_qkv.bias", tuple(n + ".bias" for n in qkv), "qkv"))
    if shape.family.qk_norm:
        kind: Kind = "slice" if shape.family.post_norm else "whole"
        out.append(ParameterMapping(m + "self_attention.q_layernorm.weight", (attention + "q_norm.weight",), kind))
        out.append(ParameterMapping(m + "self_attention.k_layernorm.weight", (attention + "k_norm.weight",), kind))
    return out


def _mlp_mappings(m: str, h: str, expert: int | None) -> list[ParameterMapping]:
    return [
        ParameterMapping(m + "linear_fc1.weight", (h + "gate_proj.weight", h + "up_proj.weight"), "gate_up", expert),
        ParameterMapping(m + "linear_fc2.weight", (h + "down_proj.weight",), "columns", expert),
    ]


# TransformerEngine's fused layers hold the preceding norm under the linear's own name, and so do all checkpoints.
ALIASES = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
)


def canonical_name(name: str, first_layer: int, first_expert: int = 0) -> str:
    """The table's name of a parameter of one model chunk.

    Args:
        name: from `named_parameters()` of the bare GPTModel.
        first_layer: model-wide number (from 0) of the chunk's first layer.
        first_expert: number of this rank's first expert.
    """
    for alias, plain in ALIASES:
        name = name.replace(alias, plain)
    name = re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) + first_expert), name)
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + first_layer), name)


def hf_names(shape: ModelShape) -> set[str]:
    """Every tensor of the Hugging Face checkpoint."""
    return {name for mapping in parameter_mappings(shape).values() for name in mapping.hf}


def check_names(present: set[str], shape: ModelShape, where: str) -> None:
    """Account for every tensor of a checkpoint.

    Raises:
        ConfigError: names the missing and the unexpected tensors.
    """
    expected = hf_names(shape)
    # A tied checkpoint may repeat the embedding under the head's name; old ones carry rotary buffers.
    present = {
        n for n in present if not n.endswith("rotary_emb.inv_freq") and not (shape.tied and n == "lm_head.weight")
    }
    missing, extra = expected - present, present - expected
    faults = [f"{len(missing)} tensors are missing: {some_names(missing)}"] if missing else []
    if extra:
        faults.append(f"{len(extra)} tensors are not part of the model: {some_names(extra)}")
    if faults:
        raise ConfigError(f"{where}: {'; '.join(faults)}")


def some_names(names: Iterable[str], *, order: bool = True) -> str:
    """The first few names of many, in one line, whatever characters a foreign file has put into them."""
    listed = sorted(names) if order else list(names)
    more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in listed[:6]) + more


def hf_shapes(mapping: ParameterMapping, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of a rule's Hugging Face tensors, in order."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ffn = shape.ffn if mapping.expert is None else shape.require_experts.ffn
    if mapping.kind == "qkv":
        tail = (shape.hidden,) if mapping.megatron.endswith("weight") else ()
        return [(n, *tail) for n in (q, kv, kv)]
    if mapping.kind == "gate_up":
        return [(ffn, shape.hidden)] * 2
    if mapping.kind == "rows":
        return [(shape.vocab, shape.hidden)]
    if mapping.kind == "slice":
        return [(q if ".q_layernorm." in mapping.megatron else kv,)]
    if mapping.kind == "columns":
        return [(shape.hidden, q if "linear_proj" in mapping.megatron else ffn)]
    if mapping.megatron.endswith("router.weight"):
        return [(shape.require_experts.count, shape.hidden)]
    return [
        (
            shape.head_dim
            if "_layernorm" in mapping.megatron and ".self_attention." in mapping.megatron
            else shape.hidden,
        )
    ]


def row_ranges(mapping: ParameterMapping, shape: ModelShape) -> list[tuple[str, int, int]]:
    """(Hugging Face tensor, first row, end) of the rows of the whole parameter, with one tensor-parallel rank.

    Empty for q, k, v, which are interleaved; every other parameter is its tensors one below the other.
    """
    out: list[tuple[str, int, int]] = []
    if mapping.kind != "qkv":
        for name, size in zip(mapping.hf, hf_shapes(mapping, shape), strict=True):
            first = out[-1][2] if out else 0
            out.append((name, first, first + size[0]))
    return out


def to_shard(
    mapping: ParameterMapping, shape: ModelShape, tensors: list[torch.Tensor], tp_size: int, tp_rank: int
) -> torch.Tensor:
    """One rank's slice of a Megatron parameter from its whole Hugging Face tensors; zeros pad the vocabulary."""
    if mapping.kind == "whole":
        return tensors[0]
    if mapping.kind == "columns":
        return tensors[0].chunk(tp_size, dim=1)[tp_rank]
    if mapping.kind == "slice":
        return tensors[0].chunk(tp_size)[tp_rank]
    if mapping.kind == "rows":
        tensor, padding = tensors[0], shape.padded_vocab(tp_size) - shape.vocab
        if padding:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
        return tensor.chunk(tp_size, dim=0)[tp_rank]
    if mapping.kind == "gate_up":
        return torch.cat([t.chunk(tp_size, dim=0)[tp_rank] for t in tensors])
    tail = tensors[0].shape[1:]
    groups = [t.reshape(shape.kv_heads, -1, *tail) for t in tensors]  # [kv heads, rows of that head, ...]
    fused = torch.cat(groups, dim=1)
    return fused.chunk(tp_size, dim=0)[tp_rank].reshape(-1, *tail)


def from_shards(mapping: ParameterMapping, shape: ModelShape, shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """The whole Hugging Face tensors from the slices of all tensor-parallel ranks; inverse of to_shard.

    Of a single slice they may be views.
    """
    if mapping.kind == "whole":
        return [shards[0]]
    if mapping.kind == "columns":
        return [_joined(shards, dim=1)]
    if mapping.kind == "slice":
        return [_joined(shards)]
    if mapping.kind == "rows":
        return [_joined(shards)[: shape.vocab]]
    if mapping.kind == "gate_up":
        halves = [s.chunk(2, dim=0) for s in shards]
        return [_joined([h[0] for h in halves]), _joined([h[1] for h in halves])]
    tail = shards[0].shape[1:]
    fused = _joined(shards).reshape(shape.kv_heads, -1, *tail)
    q_rows = shape.heads // shape.kv_heads * shape.head_dim
    parts = fused.split([q_rows, shape.head_dim, shape.head_dim], dim=1)
    return [p.reshape(-1, *tail) for p in parts]


def _joined(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)
