"""Tiny models, prompts and configs that the tests share."""

from pathlib import Path

import msgspec
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dapo_megatron.arrays import encode_array
from dapo_megatron.batching.batch import StepBatch
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.packing import pack_shard
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.config import RunConfig
from dapo_megatron.records import Group, Prompt, Response, VersionSpan

KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
KINDS["qwen3_moe_raw"] = KINDS["qwen3_moe"]
UNLIKE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "rms_norm_eps": 1e-5,
}
"""Options by which no number stands for another: 2 heads a group, a head size that hidden / heads is not."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def hf_folder(
    path: Path, kind: str = "qwen3", tied: bool = True, layers: int = 2, vocab: int = 64, seed: int = 0, **options
) -> Path:
    """A random Hugging Face checkpoint whose norms and biases are not trivial; `options` are its config's."""
    config_class, model_class = KINDS[kind]
    extra = {} if kind in ("qwen2", "olmo2") else {"head_dim": 16}
    if kind.startswith("qwen3_moe"):
        extra |= EXPERTS | {"norm_topk_prob": kind == "qwen3_moe"}
    if kind == "mistral":
        extra |= {"sliding_window": None}
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    config = config_class(**(sizes | extra | options))
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    model.save_pretrained(path)
    return path


def run_config(path: Path, **sections: dict) -> RunConfig:
    """A float32 config for a tiny model; keyword arguments replace sections."""
    tree = {
        "model": {"path": str(path), "dtype": "float32"},
        "data": {"train": "unused.jsonl", "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 32},
        "algorithm": {"overlong_cache": 8},
        "engine": {"context_length": 512},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "trainer": {"mini_batch_prompts": 2, "collective_timeout_s": 60},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return RunConfig.model_validate(tree)


def response(prompt_id: str, sample: int, token_ids: list[int], **fields) -> Response:
    """A response of given tokens; by default, all are trained, have log-prob 0 and are of version 0."""
    n = len(token_ids)
    given = {
        "loss_mask": [True] * n,
        "rollout_logprobs": [0.0] * n,
        "version_spans": [VersionSpan(0, 0, n)],
        "finish_reason": "stop",
        "text": "",
    } | fields
    columns = {
        "token_ids": np.array(token_ids, np.int32),
        "loss_mask": np.array(given.pop("loss_mask"), np.bool_),
        "rollout_logprobs": np.array(given.pop("rollout_logprobs"), np.float32),
    }
    return Response(prompt_id, sample, **columns, **given)


def same(a, b) -> bool:
    """Whether two records are equal bit for bit, NaN too."""
    return msgspec.msgpack.encode(a, enc_hook=encode_array) == msgspec.msgpack.encode(b, enc_hook=encode_array)


def groups(n: int = 4, size: int = 4, vocab: int = 64, seed: int = 0) -> list[Group]:
    """Random groups of unequal lengths with advantages of zero mean."""
    g = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=g).tolist()

    out = []
    for order in range(n):
        prompt = Prompt(
            id=f"p{order}", input_ids=ints(2, vocab, ints(3, 9, 1)[0]), ground_truth="1", text="", row=order
        )
        responses = []
        for sample in range(size):
            length = ints(1, 12, 1)[0]
            responses.append(
                response(
                    prompt.id,
                    sample,
                    ints(2, vocab, length),
                    rollout_logprobs=(-torch.rand(length, generator=g) * 4).tolist(),
                    advantage=(sample - (size - 1) / 2),
                )
            )
        out.append(Group(order=order, prompt=prompt, responses=responses))
    return out


def packed_batch(groups: list[Group], *, rules: PackingRules, **options) -> StepBatch:
    """The batch of a step with packed micro-batches for sequences; `options` are build_step_batch's."""
    batch = build_step_batch(groups, rules=rules, **options)
    for mini_batch in batch.mini_batches:
        mini_batch.shards = [pack_shard(shard, rules) for shard in mini_batch.shards]
    return batch


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, after three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
