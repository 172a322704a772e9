"""Runs in an engine's environment: SGLang's own attention of many sequences beside what the plugin puts in its place.

Prints JSON: for decode and extend, whether the method was replaced, the largest difference, and the seconds of both.
"""

import json
import time

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend
from sglang.srt.plugins import load_plugins

SLOTS, KV_HEADS, HEADS, SIZE = 4000, 2, 4, 32


def batch(kind, lengths, generator):
    """Arguments of one call: sequences of these lengths in a cache of random numbers."""
    lens = torch.tensor(lengths)
    new = torch.ones_like(lens)
    if kind == "extend":
        new = (torch.rand(len(lens), generator=generator) * lens).long() + 1
    pools = torch.randperm(2 * len(lens), generator=generator)[: len(lens)]
    slots = torch.randint(1, SLOTS, (2 * len(lens), max(lengths) + 5), generator=generator, dtype=torch.int32)
    keys, values = (torch.randn(SLOTS, KV_HEADS, SIZE, generator=generator) for _ in range(2))
    keys[0] = values[0] = 0.0
    query = torch.randn(int(new.sum()), HEADS, SIZE, generator=generator)
    counts = [lens - new, new] if kind == "extend" else []
    return query, [keys, values, slots, pools, lens, *counts, None]


def measure(method, kind, calls):
    """(outputs, seconds of the last call)."""
    options = {"scaling": 0.2, "enable_gqa": True, "causal": kind == "extend"}
    options |= {"is_cross_attn": False, "sliding_window_size": None}
    outputs = []
    for query, arguments in calls:
        began = time.perf_counter()
        outputs.append(method(object.__new__(Backend), query, torch.empty_like(query), *arguments, **options))
        seconds = time.perf_counter() - began
    return outputs, seconds


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    methods = {"decode": "_run_sdpa_forward_decode", "extend": "_run_sdpa_forward_extend"}
    lengths = [[1], [7], [1, 2, 3, 4, 5, 8, 9, 1000], [3, 1500], [13] * 3 + [6] * 253, [8] * 256]
    calls = {kind: [batch(kind, some, generator) for some in lengths] for kind in methods}
    own = {kind: getattr(Backend, name) for kind, name in methods.items()}
    load_plugins()
    found = {}
    for kind, name in methods.items():
        before, slow = measure(own[kind], kind, calls[kind])
        after, fast = measure(getattr(Backend, name), kind, calls[kind])
        worst = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
        replaced = getattr(Backend, name) is not own[kind]
        found[kind] = {"replaced": replaced, "difference": worst, "own_s": slow, "plugin_s": fast}
    print(json.dumps(found))


main()
