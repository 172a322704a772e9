"""What the model families have in common and where they differ, read from a Hugging Face config."""

from dataclasses import dataclass
from typing import Any

from dapo_megatron.errors import DapoError


@dataclass(frozen=True)
class Family:
    """A decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, dense or a mixture of experts."""

    architecture: str
    qkv_bias: bool
    qk_norm: bool
    mixture: bool = False
    """The feed-forward part of every layer is a mixture of experts."""


FAMILIES = {
    f.architecture: f
    for f in (
        Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False),
        Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
        Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True),
        Family("Qwen3MoeForCausalLM", qkv_bias=False, qk_norm=True, mixture=True),
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
    rope_scaling_factor: float | None
    """Llama 3's rotary scaling factor; None is plain rotary positions."""
    max_positions: int
    experts: Experts | None = None

    @property
    def require_experts(self) -> Experts:
        """The experts of a model that is known to have some."""
        assert self.experts is not None
        return self.experts


def model_shape(hf: Any) -> ModelShape:
    """Read a transformers config.

    Raises:
        DapoError: an architecture or an option that is not supported, by name.
    """
    architecture = (hf.architectures or ["none"])[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise DapoError(f"architecture {architecture} is not supported: use one of {', '.join(FAMILIES)}")
    for option, supported in (("attention_bias", False), ("mlp_bias", False), ("use_sliding_window", False)):
        if getattr(hf, option, supported) not in (supported, None):
            raise DapoError(f"config.json: {option}={getattr(hf, option)} is not supported for {architecture}")
    if hf.hidden_act != "silu":
        raise DapoError(f"config.json: hidden_act={hf.hidden_act} is not supported: only silu")
    theta, factor = _rope(hf)
    return ModelShape(
        family=family,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        ffn=hf.intermediate_size,
        heads=hf.num_attention_heads,
        kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        vocab=hf.vocab_size,
        tied=hf.tie_word_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=theta,
        rope_scaling_factor=factor,
        max_positions=hf.max_position_embeddings,
        experts=_experts(hf) if family.mixture else None,
    )


def _experts(hf: Any) -> Experts:
    if hf.decoder_sparse_step != 1 or hf.mlp_only_layers:
        raise DapoError(
            f"config.json: decoder_sparse_step={hf.decoder_sparse_step}, mlp_only_layers={hf.mlp_only_layers} is not "
            "supported: every layer must be a mixture of experts"
        )
    return Experts(hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size, hf.norm_topk_prob)


_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def _rope(hf: Any) -> tuple[float, float | None]:
    rope = dict(hf.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return rope["rope_theta"], None
    # megatron-core's rotary embedding has Llama 3's constants built in; only the factor is an argument.
    if kind == "llama3" and all(rope.get(k) == v for k, v in _LLAMA3_ROPE.items()):
        return rope["rope_theta"], rope["factor"]
    raise DapoError(f"config.json: rotary scaling {rope} is not supported: only default and llama3")
