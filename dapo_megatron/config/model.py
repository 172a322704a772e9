"""The model that is trained."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class ModelConfig(Section):
    path: str = Field(min_length=1)
    """Hugging Face checkpoint folder (config.json, safetensors, tokenizer)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the trainer's parameters and activations (gradients and the optimizer are float32)."""
