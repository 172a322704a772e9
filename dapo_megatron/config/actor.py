"""The trainer's parallel layout, precision and optimizer."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class ActorConfig(Section):
    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Stages of layers (PP)."""
    virtual_pipeline_model_parallel_size: int = Field(1, ge=1)
    """Model chunks that each pipeline stage holds, interleaved (VPP); 1 is off."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share out the experts of a layer (EP), taken out of TP x CP x DP."""
    data_parallel_size: int = Field(1, ge=1)
    """Copies of the model that share each mini-batch (DP)."""
    sequence_parallel: bool = True
    """Split activations between layers along the sequence over TP (used where TP > 1)."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Token budget of one packed micro-batch, over its CP ranks together; a longer sequence stands alone."""
    loss_chunk_tokens: int = Field(256, ge=1)
    """Token chunk size of the fused linear cross-entropy: logits exist for so many tokens at a time."""
    recompute: bool = False
    """Recompute every layer's activations in backward."""
    layer_spec: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layer implementation; auto takes TransformerEngine where it can be imported."""

    @property
    def world_size(self) -> int:
        """Ranks of the layout: TP x PP x CP x DP."""
        sizes = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return sizes * self.context_parallel_size * self.data_parallel_size


class PrecisionConfig(Section):
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """FP8 recipe of the layers' matrix products (docs/gpu.md says what each needs); off is model.dtype."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """e4m3 everywhere, or hybrid: e5m2 for gradients; null is TransformerEngine's default for the recipe."""
    bf16_layers_at_start: int = Field(0, ge=0)
    """First layers that stay in bfloat16; not with delayed."""
    bf16_layers_at_end: int = Field(0, ge=0)
    """Last layers that stay in bfloat16; not with delayed."""
    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 (1 byte each) and gather them so over data parallelism; masters are float32."""


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    """AdamW's learning rate after the warm-up."""
    warmup_steps: int = Field(20, ge=0)
    """Linear warm-up in rollout steps (times the updates of a step: the schedule counts updates)."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's second-moment decay."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_grad: float = Field(1.0, gt=0)
    """Global gradient norm clip."""
