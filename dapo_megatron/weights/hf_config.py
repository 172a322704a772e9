"""config.json of a Hugging Face folder -> the numbers of the model, or one line that says why not.

The file itself is read, before transformers fills in defaults: a key is honoured (a field of _Fields or _Mixture, or
part of the rotary scaling), cannot change the model's outputs (_HARMLESS), has the value that changes nothing
(_NEUTRAL), is null, or is refused by name. What this version does not know might change the numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from transformers import CONFIG_MAPPING

from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.weights.families import FAMILIES, Experts, Family, ModelShape, RopeScaling
from dapo_megatron.weights.hf_rope import ROPE_OPTIONS, Refusal, read_rope, show

_Size = Annotated[int, Field(gt=0, lt=2**31)]
_Number = Annotated[int, Field(gt=0, le=10_000)]
"""Of layers or experts: each of them has a place in tables of parameters."""


class _Fields(BaseModel):
    """Types of the keys that are honoured; absent keys get transformers' defaults."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Number
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rms_norm_eps: PositiveFloat | None = None
    max_position_embeddings: _Size | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: PositiveFloat | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: _Size | None = None
    sliding_window: _Size | None = None


class _Mixture(_Fields):
    num_experts: _Number | None = None
    num_local_experts: _Number | None = None
    num_experts_per_tok: _Size
    moe_intermediate_size: _Size
    norm_topk_prob: bool | None = None


_HARMLESS = frozenset(transformers.GenerationConfig().to_dict()) | frozenset(
    """
    architectures model_type tokenizer_class dtype torch_dtype transformers_version _name_or_path name_or_path
    initializer_range attention_dropout router_aux_loss_coef output_router_logits output_attentions output_hidden_states
    return_dict chunk_size_feed_forward problem_type id2label label2id num_labels finetuning_task task_specific_params
    use_cache pretraining_tp max_window_layers is_decoder torchscript use_bfloat16 tf_legacy_loss prefix
    sep_token_id unk_token_id penalty_alpha num_beam_groups cross_attention_hidden_size
    _commit_hash _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    _experts_implementation is_llama_config transformers.js_config unsloth_version unsloth_fixed
    """.split()
)
"""Names, how to generate, how to train in transformers, how to compute the same, and marks of tools."""

_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Keys with the one value that is supported."""


def read_model(folder: str | Path) -> ModelShape:
    """Read the config.json of a Hugging Face folder; runs no code of the folder and asks nothing.

    Raises:
        ConfigError: there is no such file, or the model or one of its options is not supported, by name.
        DapoError: the disk does not give it.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path, f"{folder} has no config.json: give a Hugging Face checkpoint folder")
    _refuse_remote_code(Path(folder))
    try:
        family = _family(raw)
        given = _check_keys(raw, family)
        return _shape(given, family)
    except Refusal as e:
        raise ConfigError(f"{path}: {e}") from None


def read_json(path: Path, absent: str) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        ConfigError: it is absent (the text given), or something else.
        DapoError: the disk does not give it.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(absent) from None
    except OSError as e:
        raise DapoError(f"{path} cannot be read as JSON: {_line(e)}") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read as JSON: {_line(e)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object, it holds a {type(tree).__name__}")
    return tree


def _refuse_remote_code(folder: Path) -> None:
    # transformers would ask on the terminal whether to run the folder's code.
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.exists() and read_json(path, "").get("auto_map"):
            raise ConfigError(
                f"{path} asks for code of the folder (auto_map), which is never run: use a model without it, or remove "
                "auto_map if transformers' own class reads this one"
            )


def _family(raw: Mapping[str, Any]) -> Family:
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise Refusal(f"architecture {show(name)} is not supported: use one of {', '.join(FAMILIES)}")
    if model_type != family.model_type:
        raise Refusal(
            f"model_type {show(model_type)} is not supported with {name}: transformers builds another model of it "
            f"than of {family.model_type}"
        )
    return family


def _check_keys(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The honoured keys with their values, checked for type."""
    fields = _Mixture if family.mixture else _Fields
    for key, value in raw.items():
        if key == "sliding_window" and family.window == "none" and value is not None:
            raise _unsupported(key, value, family)
        if key in fields.model_fields or key in _HARMLESS or value is None:
            continue
        if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if key in ("quantization_config", "compression_config"):
            raise Refusal(f"{key}: a quantised checkpoint cannot be trained: give the one in bfloat16 or float32")
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        raise _unsupported(key, value, family)
    try:
        fields.model_validate(dict(raw))
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        what = "is missing" if first["type"] == "missing" else f"is {show(first['input'])}: {first['msg']}"
        raise Refusal(f"{'.'.join(map(str, first['loc']))} {what}") from None
    return {key: raw[key] for key in fields.model_fields if key in raw}


def _unsupported(key: str, value: Any, family: Family) -> Refusal:
    if key in _NEUTRAL:
        return Refusal(f"{key}={show(value)} is not supported: only {show(_NEUTRAL[key])}")
    return Refusal(
        f"{key}={show(value)} is not supported for {family.architecture}; if it does not change the model's outputs, "
        "remove it"
    )


def _shape(given: dict[str, Any], family: Family) -> ModelShape:
    rope = read_rope(given)
    if {"num_experts", "num_local_experts"} <= given.keys() and given["num_experts"] != given["num_local_experts"]:
        raise Refusal(f"num_experts={given['num_experts']}, but num_local_experts={given['num_local_experts']}")
    arguments = {k: v for k, v in given.items() if k != "rope_scaling" and not (k == "rope_theta" and v is None)}
    arguments["rope_parameters"] = {k: v for k, v in rope.items() if k != "attn_factor"}
    try:
        hf = CONFIG_MAPPING[family.model_type](**arguments)
        # transformers' layers do this again, and only then is original_max_position_embeddings beside the options used.
        hf.standardize_rope_params()
    except (StrictDataclassError, TypeError, ValueError) as e:
        raise Refusal(f"transformers refuses it: {_line(e)}") from None
    rope = hf.rope_parameters | rope
    shape = ModelShape(
        family=family,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        ffn=hf.intermediate_size,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        vocab=hf.vocab_size,
        tied=hf.tie_word_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_scaling(rope),
        max_positions=hf.max_position_embeddings,
        experts=_experts(hf) if family.mixture else None,
        window=hf.sliding_window if family.window == "always" else None,
    )
    if shape.heads % shape.kv_heads:
        raise Refusal(f"num_attention_heads={shape.heads} is not a multiple of num_key_value_heads={shape.kv_heads}")
    if shape.head_dim % 2:
        raise Refusal(f"the head size {shape.head_dim} is odd: rotary positions turn pairs")
    return shape


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope["rope_type"]
    names = {name for names in ROPE_OPTIONS[kind] for name in names} & rope.keys()
    return None if kind == "default" else RopeScaling(kind, tuple((name, rope[name]) for name in sorted(names)))


def _experts(hf: Any) -> Experts:
    if hf.num_experts_per_tok > hf.num_experts:
        raise Refusal(f"num_experts_per_tok={hf.num_experts_per_tok} exceeds num_experts={hf.num_experts}")
    if hf.num_experts_per_tok == 1 and hf.norm_topk_prob:
        raise Refusal("num_experts_per_tok=1 with norm_topk_prob=true is not supported by megatron-core")
    return Experts(hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size, hf.norm_topk_prob)


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]
