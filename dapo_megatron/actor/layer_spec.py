"""The layers of the policy: TransformerEngine's where it is installed, otherwise plain torch.

The torch layers are plugged into megatron-core through its ModuleSpec; they supply what its `local` spec lacks: a
normalisation that knows sequence parallelism, and attention over packed sequences (cu_seqlens).
"""

import importlib.util
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from dapo_megatron.actor.slices import context_order, context_rows
from dapo_megatron.errors import ConfigError


def layer_spec(config: TransformerConfig, kind: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers of one model chunk; `kind` is actor.layer_spec: auto, torch or transformer_engine.

    Raises:
        ConfigError: transformer_engine was asked for and is not installed.
    """
    available = importlib.util.find_spec("transformer_engine") is not None
    if kind == "transformer_engine" and not available:
        raise ConfigError(
            "actor.layer_spec=transformer_engine, but TransformerEngine is not installed: pip install '.[te]'"
        )
    if kind == "transformer_engine" or (kind == "auto" and available):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    return torch_block_spec(config, vp_stage)


def torch_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """megatron-core's local block spec with TorchRMSNorm and PackedAttention in place."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = TorchRMSNorm
        if config.num_moe_experts is not None:
            # TransformerEngine's layers name this norm so in checkpoints: either kind of layer reads the other's.
            parts.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        attention = parts.self_attention.submodules
        attention.core_attention = PackedAttention
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention, name) not in (IdentityOp, None):
                setattr(attention, name, TorchRMSNorm)
    block.layer_norm = TorchRMSNorm
    return block


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says that its gradient must be summed over TP under sequence parallelism.

    megatron-core's WrappedTorchNorm asserts that sequence parallelism is off.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences on torch's scaled_dot_product_attention.

    Under context parallelism every rank gathers keys and values of all ranks and answers its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: object,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: object,
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None else mpu.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        attn_mask_type: object = None,
        attention_bias: object = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [t, heads, d], key and value [t, kv heads, d] -> [t, heads, d]; sequences end at cu_seqlens_q."""
        assert packed_seq_params is not None
        cu_seqlens = packed_seq_params.cu_seqlens_q
        cp = self.cp_group.size()
        if cp == 1:
            return self._attend(query, key, value, cu_seqlens, cu_seqlens, None)
        order = torch.from_numpy(context_order(cu_seqlens.cpu().numpy(), cp)).to(key.device)
        key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group)[order] for x in (key, value))
        return self._attend(query, key, value, cu_seqlens // cp, cu_seqlens, self.cp_group.rank())

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_queries: torch.Tensor,
        cu_keys: torch.Tensor,
        cp_rank: int | None,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        for q_rows, k_rows in zip(_rows_by_length(cu_queries), _rows_by_length(cu_keys), strict=True):
            q = query[q_rows].transpose(1, 2)  # [n, heads, length, d]
            k, v = (x[k_rows].transpose(1, 2) for x in (key, value))
            mask = None if cp_rank is None else _zigzag_mask(q.size(2), k.size(2), cp_rank, q.device)
            part = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
            )
            output = output.index_put((q_rows,), part.transpose(1, 2))
        return output


def _zigzag_mask(queries: int, keys: int, cp_rank: int, device: torch.device) -> torch.Tensor:
    """[queries, keys] bool: which keys of a whole sequence this context-parallel rank's queries may see."""
    boundaries = np.array([0, keys], dtype=np.int32)
    positions = torch.from_numpy(context_rows(boundaries, keys // queries, cp_rank)).to(device)
    return positions[:, None] >= torch.arange(keys, device=device)


def _rows_by_length(cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """Row indices [n, length] for each distinct length: equal lengths go through one kernel without padding."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    return [
        starts[lengths == length, None] + torch.arange(length, device=cu_seqlens.device)
        for length in lengths.unique().tolist()
        if length > 0
    ]
