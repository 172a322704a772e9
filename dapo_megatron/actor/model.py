"""The policy as a megatron-core GPTModel, built from the numbers of a Hugging Face config.

With an interleaved pipeline (VPP) a rank holds several model chunks; everywhere else the list has one.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from dapo_megatron.actor.layer_spec import layer_spec
from dapo_megatron.actor.post_norm import post_norm_block_spec
from dapo_megatron.actor.precision import ddp_arguments, model_arguments
from dapo_megatron.config import ActorConfig, PrecisionConfig, RunConfig
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.rotary import scaled_frequencies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    actor: ActorConfig, precision: PrecisionConfig, shape: ModelShape, dtype: torch.dtype
) -> TransformerConfig:
    """megatron-core's config for this model, layout and precision."""
    tp, pp = actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size
    chunks, cp = actor.virtual_pipeline_model_parallel_size, actor.context_parallel_size
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        # With it, megatron-core sums these gradients over TP: right for replicated weights, not for slices of them.
        qk_layernorm=shape.family.qk_norm and not shape.family.post_norm,
        softmax_scale=_softmax_scale(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=actor.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size(actor),
        sequence_parallel=actor.sequence_parallel and tp > 1,
        # Packed micro-batches differ in length, so pipeline stages exchange shapes before tensors. The interleaved
        # schedule gets equal lengths instead: batch_p2p_comm, which it would exchange shapes and tensors by, mixes up
        # the two directions between two stages and is silently wrong.
        variable_seq_lengths=pp > 1 and chunks == 1,
        batch_p2p_comm=chunks == 1,
        overlap_p2p_comm=chunks > 1,
        moe_token_dispatcher_type="alltoall",  # the default is refused with variable lengths, experts or not
        **_expert_options(shape, fp8=precision.fp8 != "off"),
        # The loss is a weighted sum whose denominators are already in the weights: see actor.actor.
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if actor.recompute else None,
        recompute_method="uniform" if actor.recompute else None,
        recompute_num_layers=1 if actor.recompute else None,
        **model_arguments(precision),
    )


def _softmax_scale(shape: ModelShape) -> float | None:
    """None is 1 / sqrt(head size)."""
    if shape.rope_scaling is None:
        return None
    # A factor of cosine and sine is one of queries and of keys, so its square is one of their products.
    return scaled_frequencies(shape)[1] ** 2 / math.sqrt(shape.head_dim)


def _expert_options(shape: ModelShape, *, fp8: bool) -> dict[str, Any]:
    if shape.experts is None:
        return {}
    return dict(
        num_moe_experts=shape.experts.count,
        moe_router_topk=shape.experts.per_token,
        moe_ffn_hidden_size=shape.experts.ffn,
        # Softmax over the chosen experts equals softmax over all of them, renormalised over the chosen.
        moe_router_pre_softmax=not shape.experts.renormalise,
        moe_router_dtype="fp32",
        # The policy gradient is all that trains: no auxiliary loss, and no token is dropped.
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_z_loss_coeff=None,
        moe_expert_capacity_factor=None,
        moe_grouped_gemm=False,
        moe_router_padding_for_quantization=fp8,
    )


class PolicyModel(GPTModel):
    """GPTModel that ends in hidden states [s, 1, h]: actor.token_loss makes the logits, a chunk at a time."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states

    @property
    def output_weight(self) -> torch.Tensor:
        """[vocab / TP, h] of the output layer, on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(config: RunConfig, shape: ModelShape) -> list[DistributedDataParallel]:
    """This rank's model chunks, each wrapped for data parallelism; weights are not set."""
    mcore = transformer_config(config.actor, config.precision, shape, DTYPES[config.model.dtype])
    mcore.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, **ddp_arguments(config.precision)
    )
    chunks = config.actor.virtual_pipeline_model_parallel_size
    stages = range(chunks) if chunks > 1 else [None]
    return [DistributedDataParallel(mcore, ddp, policy_module(config, shape, mcore, stage)) for stage in stages]


def policy_module(config: RunConfig, shape: ModelShape, mcore: TransformerConfig, vp_stage: int | None) -> PolicyModel:
    """One bare model chunk on this rank, its only one for vp_stage None; weights are not set."""
    if shape.family.post_norm:
        spec = post_norm_block_spec(mcore, vp_stage)
    else:
        spec = layer_spec(mcore, config.actor.layer_spec, vp_stage)
    module = PolicyModel(
        mcore,
        spec,
        vocab_size=shape.padded_vocab(config.actor.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=vp_stage,
    )
    if shape.rope_scaling is not None:
        # megatron-core's own scaling is Llama 3.1's, with its constants built in.
        module.rotary_pos_emb.inv_freq = scaled_frequencies(shape)[0]
    return module
