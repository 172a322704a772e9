"""Layers that normalise what attention and MLP give instead of what they take (OLMo 2, arXiv 2501.00656, section 3.1).

    x + norm(attention(x)), then x + norm(mlp(x)); queries and keys are normalised over all heads together

megatron-core has no place for the first: the norm is a part of the linear layer that ends the branch.
"""

from typing import Any

import torch
import torch.distributed.nn
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from dapo_megatron.actor.layer_spec import TorchRMSNorm, torch_block_spec


def post_norm_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The torch block spec with norms after attention and MLP."""
    block = torch_block_spec(config, vp_stage)
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        attention = parts.self_attention.submodules
        attention.linear_proj = parts.mlp.submodules.linear_fc2 = NormedRowParallelLinear
        attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    return block


class NormedRowParallelLinear(RowParallelLinear):
    """RowParallelLinear, and the norm of its output."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any):
        super().__init__(input_size, output_size, config=config, **options)
        self.norm = TorchRMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, in / TP] -> [s, b, out], or this rank's rows of it under sequence parallelism."""
        output, bias = super().forward(input_)
        return self.norm(output), bias


class _WidthNorm(torch.nn.Module):
    """RMSNorm over all heads, of which each tensor-parallel rank holds its own, with its slice of the weight."""

    def __init__(self, config: TransformerConfig, width: int, eps: float):
        super().__init__()
        self.tp_group, self.width, self.eps = mpu.get_tensor_model_parallel_group(), width, eps
        self.weight = torch.nn.Parameter(
            torch.ones(width // self.tp_group.size(), dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, heads / TP, head size], the same."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:  # every rank's heads depend on the sum: its gradient is summed over the ranks too
            squares = torch.distributed.nn.functional.all_reduce(squares, group=self.tp_group)
        normed = flat * torch.rsqrt(squares / self.width + self.eps) * self.weight
        return normed.to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the weight for distributed checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group") or mpu.get_data_parallel_group(with_context_parallel=True),
        )


class QueryNorm(_WidthNorm):
    """The norm of all query heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(config, config.num_attention_heads * hidden_size, eps)


class KeyNorm(_WidthNorm):
    """The norm of all key heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(config, config.num_query_groups * hidden_size, eps)
