"""The policy as a megatron-core GPTModel, built from the numbers of a Hugging Face config."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from dapo_megatron.actor.layer_spec import layer_spec
from dapo_megatron.actor.precision import ddp_arguments, model_arguments
from dapo_megatron.config import ActorConfig, PrecisionConfig, RunConfig
from dapo_megatron.weights.families import ModelShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    actor: ActorConfig, precision: PrecisionConfig, shape: ModelShape, dtype: torch.dtype
) -> TransformerConfig:
    """megatron-core's config for this model, layout and precision."""
    tp, pp = actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size
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
        qk_layernorm=shape.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=actor.sequence_parallel and tp > 1,
        # Packed micro-batches differ in length, so pipeline stages exchange shapes before tensors.
        variable_seq_lengths=pp > 1,
        moe_token_dispatcher_type="alltoall",  # the default is refused with variable lengths, experts or not
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


def build_model(config: RunConfig, shape: ModelShape) -> DistributedDataParallel:
    """This rank's pipeline stage, wrapped for data parallelism; weights are not set."""
    mcore = transformer_config(config.actor, config.precision, shape, DTYPES[config.model.dtype])
    model = GPTModel(
        mcore,
        layer_spec(mcore, config.actor.layer_spec),
        vocab_size=shape.vocab,
        max_sequence_length=shape.max_positions,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, **ddp_arguments(config.precision)
    )
    mcore.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(mcore, ddp, model)
