"""The truth that every layout is held against: float64, one process, plain torch, and nothing of the package.

A decoder of the Llama, Qwen2, Qwen3, Qwen3-MoE or OLMo 2 family computed from the tensors of a Hugging Face folder, one
sequence at a time, and the DAPO loss as a loop over its formula (arXiv 2503.14476, equations 8 to 12).
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config.json, {tensor name: float64 leaf that wants a gradient})."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return config, {name: t.double().requires_grad_() for name, t in tensors.items()}


def norm(x, weight, eps):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """Rotary positions on [heads, n, d], halves rotated against each other."""
    n, d = x.shape[-2:]
    angles = torch.outer(torch.arange(n, dtype=x.dtype), theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d))
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(x, w, name, c):
    n, d = x.size(0), c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]

    def project(part, heads):
        y = x @ w[f"{name}.{part}_proj.weight"].T
        if f"{name}.{part}_proj.bias" in w:
            y = y + w[f"{name}.{part}_proj.bias"]
        weight = w.get(f"{name}.{part}_norm.weight")
        if weight is not None and weight.numel() == heads * d:  # over all heads together
            y = norm(y, weight, c["rms_norm_eps"])
        y = y.view(n, heads, d).transpose(0, 1)
        if weight is not None and weight.numel() == d:
            y = norm(y, weight, c["rms_norm_eps"])
        return y

    heads, kv_heads, theta = c["num_attention_heads"], c["num_key_value_heads"], c["rope_parameters"]["rope_theta"]
    q, k = rotate(project("q", heads), theta), rotate(project("k", kv_heads), theta)
    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, project("v", kv_heads)))
    scores = q @ k.transpose(1, 2) / math.sqrt(d)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return out.transpose(0, 1).reshape(n, -1) @ w[f"{name}.o_proj.weight"].T


def mlp(x, w, name):
    gate, up = x @ w[f"{name}.gate_proj.weight"].T, x @ w[f"{name}.up_proj.weight"].T
    return (torch.nn.functional.silu(gate) * up) @ w[f"{name}.down_proj.weight"].T


def mixture(x, w, name, c, margins):
    scores = (x @ w[f"{name}.gate.weight"].T).softmax(-1)
    k = c["num_experts_per_tok"]
    chosen, experts = scores.topk(k + 1, dim=-1)
    margins.append(float((chosen[:, k - 1] - chosen[:, k]).min()))
    chosen, experts = chosen[:, :k], experts[:, :k]
    if c["norm_topk_prob"]:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    rows = [
        sum(chosen[t, i] * mlp(x[t], w, f"{name}.experts.{int(experts[t, i])}") for i in range(k))
        for t in range(x.size(0))
    ]
    return torch.stack(rows)


def logits(ids, w, c, margins):
    """[n, vocabulary]; `margins` collects how far the last chosen expert is ahead of the first one left out."""
    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}"
        if f"{name}.post_feedforward_layernorm.weight" in w:  # norms after each part
            y = attention(x, w, f"{name}.self_attn", c)
            x = x + norm(y, w[f"{name}.post_attention_layernorm.weight"], c["rms_norm_eps"])
            y = mlp(x, w, f"{name}.mlp")
            x = x + norm(y, w[f"{name}.post_feedforward_layernorm.weight"], c["rms_norm_eps"])
            continue
        y = norm(x, w[f"{name}.input_layernorm.weight"], c["rms_norm_eps"])
        x = x + attention(y, w, f"{name}.self_attn", c)
        y = norm(x, w[f"{name}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        x = x + (mixture(y, w, f"{name}.mlp", c, margins) if "num_experts_per_tok" in c else mlp(y, w, f"{name}.mlp"))
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, w["model.norm.weight"], c["rms_norm_eps"]) @ head.T


def update(folder, groups, *, aggregation, temperature, eps_low, eps_high):
    """Loss, metrics and gradients of one mini-batch.

    `groups` is a list of lists of responses (prompt ids, response ids, mask, old log-probs, advantage).
    """
    c, w = load(folder)
    total = sum(sum(mask) for g in groups for _, _, mask, _, _ in g)
    active_groups = sum(any(any(mask) for _, _, mask, _, _ in g) for g in groups)
    active_responses = sum(any(mask) for g in groups for _, _, mask, _, _ in g)
    loss, scale, margins, edges = torch.zeros((), dtype=torch.float64), 0.0, [], []
    sums = dict.fromkeys(("entropy", "ratio", "high", "low"), 0.0)
    logprobs = {}
    for gi, group in enumerate(groups):
        in_group = sum(sum(mask) for _, _, mask, _, _ in group)
        for ri, (prompt, response, mask, old, advantage) in enumerate(group):
            table = (logits(prompt + response, w, c, margins) / temperature).log_softmax(-1)
            for t, token in enumerate(response):
                row = table[len(prompt) + t - 1]
                logprobs[gi, ri, t] = float(row[token])
                if not mask[t]:
                    continue
                weight = {
                    "token": 1 / total,
                    "group_token": 1 / (active_groups * in_group),
                    "sample": 1 / (active_responses * sum(mask)),
                }[aggregation]
                ratio = torch.exp(row[token] - old[t])
                clipped = min(max(float(ratio), 1 - eps_low), 1 + eps_high)
                is_clipped = clipped * advantage < float(ratio) * advantage
                loss = loss - weight * (clipped * advantage if is_clipped else ratio * advantage)
                scale += weight * abs(advantage)
                sums["entropy"] -= float((row.exp() * row).sum())
                sums["ratio"] += float(ratio)
                sums["high"] += advantage > 0 and float(ratio) > 1 + eps_high
                sums["low"] += advantage < 0 and float(ratio) < 1 - eps_low
                edges += [abs(float(ratio) - (1 + eps_high)), abs(float(ratio) - (1 - eps_low))]
    if loss.requires_grad:  # else everything is masked or clipped
        loss.backward()
    return {
        "loss": float(loss),
        "scale": scale,
        "tokens": total,
        "means": {name: value / max(total, 1) for name, value in sums.items()},
        "gradients": {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in w.items()},
        "logprobs": logprobs,
        "clip_margin": min(edges, default=1.0),
        "router_margin": min(margins, default=1.0),
    }
