"""What the model families have in common and where they differ, and the numbers of one model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """A decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, dense or a mixture of experts."""

    architecture: str
    model_type: str
    """Names the class that reads config.json; with any other, transformers builds another model of the same tensors."""
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    """Norms follow attention and MLP, and those of queries and keys are over all heads together: actor.post_norm."""
    mixture: bool = False
    """The feed-forward part of every layer is a mixture of experts."""
    window: Literal["none", "switched", "always"] = "none"
    """When config.json's `sliding_window` limits attention: never, with `use_sliding_window`, or always."""


FAMILIES = {
    f.architecture: f
    for f in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral", window="always"),
        Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, window="switched"),
        Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, window="switched"),
        Family("Olmo2ForCausalLM", "olmo2", qk_norm=True, post_norm=True),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", qk_norm=True, mixture=True, window="switched"),
    )
}


@dataclass(frozen=True)
class Experts:
    """The numbers of a mixture of experts."""

    count: int
    per_token: int
    ffn: int
    renormalise: bool
    """The weights of a token's experts sum to 1."""


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for long contexts, in transformers' words (modeling_rope_utils.py)."""

    kind: str
    """linear, llama3 or yarn."""
    options: tuple[tuple[str, float], ...]
    """(name, value): `factor`, ..., as in config.json's `rope_parameters`."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of one model that its weights and its layers are built from."""

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    """None is plain rotary positions."""
    max_positions: int
    experts: Experts | None = None
    window: int | None = None
    """Tokens that attention sees; None is all. Sequences must not be longer: the layers have no window."""

    @property
    def require_experts(self) -> Experts:
        """The experts of a model that is known to have some."""
        assert self.experts is not None
        return self.experts

    def padded_vocab(self, tp_size: int) -> int:
        """Rows of the embedding and of the output layer over all tensor-parallel ranks: each holds the same number."""
        return -(-self.vocab // tp_size) * tp_size
