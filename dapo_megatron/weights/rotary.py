"""Rotary frequencies of a model whose config.json scales them, by transformers' own functions."""

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dapo_megatron.weights.families import ModelShape


def scaled_frequencies(shape: ModelShape) -> tuple[torch.Tensor, float]:
    """(inverse frequencies [head_dim / 2] float32, what cosine and sine are multiplied by), for a scaled model.

    `attn_factor`, which transformers does not read, multiplies the second as in YaRN's code and in SGLang's
    (srt/layers/rotary_embedding/yarn.py): models that carry it were published for engines that honour it.
    """
    scaling = shape.rope_scaling
    assert scaling is not None
    options = dict(scaling.options)
    attn_factor = options.pop("attn_factor", 1.0)
    config = transformers.LlamaConfig(
        hidden_size=shape.heads * shape.head_dim,
        num_attention_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": scaling.kind, "rope_theta": shape.rope_theta, **options},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    return frequencies, factor * attn_factor
