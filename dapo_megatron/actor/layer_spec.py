"""The layers of the policy: TransformerEngine's where it is installed, otherwise plain torch.

The torch layers are plugged into megatron-core through its ModuleSpec; they supply what its `local` spec lacks: a
normalisation that knows sequence parallelism, and attention over packed sequences (cu_seqlens).
"""

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from dapo_megatron.errors import DapoError


def layer_spec(config: TransformerConfig, kind: str) -> ModuleSpec:
    """The decoder block's spec; `kind` is actor.layer_spec: auto, torch or transformer_engine.

    Raises:
        DapoError: transformer_engine was asked for and is not installed.
    """
    available = importlib.util.find_spec("transformer_engine") is not None
    if kind == "transformer_engine" and not available:
        raise DapoError(
            "actor.layer_spec=transformer_engine, but TransformerEngine is not installed: pip install '.[te]'"
        )
    if kind == "transformer_engine" or (kind == "auto" and available):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    return torch_block_spec(config)


def torch_block_spec(config: TransformerConfig) -> ModuleSpec:
    """megatron-core's local block spec with TorchRMSNorm and PackedAttention in place."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = TorchRMSNorm
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

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences on torch's scaled_dot_product_attention."""

    def __init__(self, config: TransformerConfig, *_, softmax_scale: float | None = None, **__):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [t, heads, d], key and value [t, kv heads, d] -> [t, heads, d]; sequences end at cu_seqlens_q."""
        output = torch.empty_like(query)
        for rows in _rows_by_length(packed_seq_params.cu_seqlens_q):
            q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # [n, heads, length, d]
            part = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
            )
            output = output.index_put((rows,), part.transpose(1, 2))
        return output


def _rows_by_length(cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """Row indices [n, length] for each distinct length: equal lengths go through one kernel without padding."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    return [
        starts[lengths == length, None] + torch.arange(length, device=cu_seqlens.device)
        for length in lengths.unique().tolist()
        if length > 0
    ]
