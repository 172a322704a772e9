"""config.json: published models are read as transformers reads them; anything else is refused in one line, by name."""

import json
import math

import pytest
import torch
import transformers

from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import Experts, RopeScaling
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.rotary import scaled_frequencies
from tests.unit.weights.real_configs import CONFIGS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def read(folder, tree):
    (folder / "config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return read_model(folder)


def refusal(folder, tree) -> str:
    with pytest.raises(ConfigError) as e:
        read(folder, tree)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_are_read_as_transformers_reads_them(tmp_path, name):
    shape = read(tmp_path, CONFIGS[name])
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    model = getattr(transformers, shape.family.architecture)
    with torch.device("meta"):
        layer = model(transformers.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1)).model
    attention, rotary = layer.layers[0].self_attn, layer.rotary_emb
    assert (shape.hidden, shape.ffn, shape.vocab) == (hf.hidden_size, hf.intermediate_size, hf.vocab_size)
    assert (shape.layers, shape.heads, shape.kv_heads) == (
        hf.num_hidden_layers,
        hf.num_attention_heads,
        hf.num_key_value_heads,
    )
    assert (shape.head_dim, shape.norm_eps) == (attention.head_dim, layer.norm.variance_epsilon)
    assert (shape.tied, shape.max_positions) == (hf.tie_word_embeddings, hf.max_position_embeddings)
    assert shape.family.qkv_bias == (attention.q_proj.bias is not None)
    assert shape.family.qk_norm == hasattr(attention, "q_norm")
    assert shape.window == (hf.sliding_window if shape.family.model_type == "mistral" else None)
    assert (shape.rope_scaling.kind if shape.rope_scaling else "default") == rotary.rope_type
    assert shape.rope_theta == hf.rope_parameters["rope_theta"]


def test_a_published_yarn_model_has_the_attention_scale_it_was_made_for(tmp_path):
    """attn_factor 0.878... is 1 / (0.1 ln 4 + 1): it takes back what YaRN does to the scores."""
    shape = read(tmp_path, CONFIGS["deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"])
    assert scaled_frequencies(shape)[1] == pytest.approx(1.0, abs=1e-12)
    plain = read(tmp_path, CONFIGS["Qwen/Qwen2.5-32B, with YaRN as its README says"])
    assert scaled_frequencies(plain)[1] == pytest.approx(0.1 * math.log(4) + 1)


def test_original_positions_at_the_top_level_count(tmp_path):
    inside = read(tmp_path, LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}})
    above = read(tmp_path, LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 512})
    neither = read(tmp_path, LLAMA | {"rope_scaling": LLAMA3, "max_position_embeddings": 4096})
    assert inside == above
    assert dict(neither.rope_scaling.options)["original_max_position_embeddings"] == 4096


def test_old_and_new_rotary_keys_say_the_same(tmp_path):
    old = read(tmp_path, LLAMA | {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}})
    new = read(tmp_path, LLAMA | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}})
    assert old == new and new.rope_scaling == RopeScaling("linear", (("factor", 2.0),)) and new.rope_theta == 500


@pytest.mark.parametrize(
    ("tree", "head_dim", "kv_heads"),
    [
        (LLAMA | {"head_dim": None, "num_key_value_heads": None}, 16, 4),
        (LLAMA | {"head_dim": 24, "num_key_value_heads": 2}, 24, 2),
        (MISTRAL | {"head_dim": None, "num_key_value_heads": 4}, 16, 4),
        (QWEN2 | {"num_key_value_heads": None}, 16, 4),
        (QWEN3 | {"num_key_value_heads": 1}, 128, 1),
        (MOE, 16, 2),
    ],
)
def test_defaults_are_those_of_transformers(tmp_path, tree, head_dim, kv_heads):
    shape = read(tmp_path, tree)
    assert (shape.head_dim, shape.kv_heads) == (head_dim, kv_heads)


@pytest.mark.parametrize("renormalise", [True, False, None])
def test_the_weights_of_a_tokens_experts_sum_to_one_where_it_says_so(tmp_path, renormalise):
    tree = MOE if renormalise is None else MOE | {"norm_topk_prob": renormalise}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read(tmp_path, tree).experts == Experts(4, 2, 24, hf.norm_topk_prob)
    assert renormalise in (None, hf.norm_topk_prob)


def test_a_mixture_saved_by_either_name(tmp_path):
    renamed = {k: v for k, v in MOE.items() if k != "num_experts"} | {"num_local_experts": 4}
    assert read(tmp_path, MOE) == read(tmp_path, renamed)
    assert "num_local_experts=5" in refusal(tmp_path, MOE | {"num_local_experts": 5})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 'architecture "GPT2LMHeadModel" is not supported'),
        ({"architectures": None}, "architecture null is not supported"),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
        ({"model_type": "mistral"}, 'model_type "mistral" is not supported with LlamaForCausalLM'),
        ({"model_type": "granite", "residual_multiplier": 0.22}, 'model_type "granite"'),
        ({"model_type": None}, "model_type null"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"attention_bias": True}, "attention_bias=true is not supported: only false"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_multiplier": 0.1}, "attention_multiplier=0.1 is not supported for LlamaForCausalLM"),
        ({"use_alibi": False}, "use_alibi=false"),
        ({"num_experts": 4}, "num_experts=4"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: a quantised checkpoint"),
        ({"auto_map": {"AutoConfig": "configuration_x.X"}}, "never run"),
        ({"hidden_size": "64"}, 'hidden_size is "64"'),
        ({"hidden_size": 64.5}, "hidden_size is 64.5"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers is 1073741824"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 3}, "transformers refuses it"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "15"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is"),
        ({"rope_scaling": [2]}, "rope_scaling is [2]"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 'rotary scaling "dynamic" is not supported'),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1]}}, 'rotary scaling "longrope" is not supported'),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rotary scaling"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rotary scaling"),
        ({"rope_scaling": LLAMA3 | {"factor": "32"}}, 'factor is "32"'),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor is 0"),
        ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "factor is 0.5: give a number of at least 1"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
        ({"rope_scaling": LLAMA3 | {"factor": True}}, "factor is true"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"beta_fast": 3}}, "beta_fast=3 is not supported with rope_type llama3"),
        ({"rope_scaling": YARN | {"attention_factor": 1.0, "attn_factor": 1.0}}, "cannot both be given"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "rope_scaling and rope_parameters differ"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings=64, but 1024",
        ),
        ({"rope_theta": 5, "rope_parameters": {"rope_theta": 6}}, "rope_theta=5, but 6"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "full_attention="),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, change, says):
    if says is None:  # transformers takes a name for a list of one
        assert read(tmp_path, LLAMA | change) == read(tmp_path, LLAMA)
    else:
        assert says in refusal(tmp_path, LLAMA | change)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window=true"),
        (QWEN3 | {"head_dim": None}, "head_dim"),
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported: only 1"),
        (MOE | {"mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
        (MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds num_experts=4"),
        (MOE | {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        (MOE | {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size is missing"),
        ({k: v for k, v in LLAMA.items() if k != "model_type"}, "model_type null"),
        ({}, "architecture null"),
        ("[1]", "must hold a JSON object, it holds a list"),
        ("null", "must hold a JSON object"),
        ('{"model_type": "lla', "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_other_families_and_broken_files(tmp_path, tree, says):
    assert says in refusal(tmp_path, tree)


def test_no_folder_and_no_utf8(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json: give a Hugging Face checkpoint folder"):
        read_model(tmp_path / "absent")
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_model(tmp_path)


def test_code_of_the_tokenizer_is_never_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.X", None]}}))
    assert "tokenizer_config.json asks for code of the folder" in refusal(tmp_path, LLAMA)


def test_what_does_not_change_the_numbers_passes(tmp_path):
    idle = {"attention_dropout": 0.1, "pretraining_tp": 2, "new_option": None, "use_cache": "yes", "temperature": 0.6}
    idle |= {"layer_types": ["full_attention"] * 2, "attention_bias": False, "unsloth_version": "2025.1"}
    assert read(tmp_path, LLAMA | idle) == read(tmp_path, LLAMA)
    windows = {"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": False}
    qwen2 = QWEN2 | {"num_key_value_heads": 2}
    assert read(tmp_path, qwen2 | windows) == read(tmp_path, qwen2)
    assert read(tmp_path, MISTRAL | {"num_key_value_heads": 2, "sliding_window": None}).window is None
    assert read(tmp_path, MISTRAL | {"num_key_value_heads": 2}).window == 4096  # transformers' default
