"""A plugin of SGLang 0.5.23 that makes its sampler on CPU honour a request's `sampling_seed`.

SGLang finds it by the entry point in the folder beside this file, which is on the path of engines on CPU only. As it
is, a seed counts under --enable-deterministic-inference alone (sglang/srt/sampling/sampling_batch_info.py), which needs
Triton kernels, and is hashed by a kernel of sgl_kernel (sglang/kernels/ops/sampling/murmur_hash.py): on CPU every
request draws from one generator, and its answer depends on whatever was sampled before. Requests without a seed draw
from that generator still.
"""

from collections.abc import Callable
from typing import Any

import torch

NO_SEED = -1
_32 = 0xFFFFFFFF


def register() -> None:
    """Called by SGLang in each of its processes, before it serves."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    info = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
    HookRegistry.register(f"{info}.from_schedule_batch", with_seeds, HookType.AFTER)
    HookRegistry.register("sglang.srt.layers.sampler.Sampler._sample_from_probs", sample, HookType.AROUND)
    HookRegistry.register("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash32, HookType.REPLACE)


def with_seeds(info: Any, _: object, batch: Any, vocab_size: int) -> Any:
    """Every row of a batch has a number, so that batches merge: its request's seed, or NO_SEED."""
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    numbers = [NO_SEED if seed is None else seed for seed in seeds]
    info.sampling_seed = torch.tensor(numbers, dtype=torch.int64, device=batch.device)
    return info


def sample(original: Callable[..., Any], sampler: Any, probs: torch.Tensor, info: Any, *others: Any) -> Any:
    """Sample with the seeds of those that have one; arguments are those of the method that it stands for."""
    seeds = info.sampling_seed
    if seeds is not None:
        none = seeds == NO_SEED
        drawn = torch.randint(2**31, seeds.shape) if none.any() and not none.all() else seeds
        info.sampling_seed = None if none.all() else torch.where(none, drawn, seeds)
    try:
        return original(sampler, probs, info, *others)
    finally:
        info.sampling_seed = seeds


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column), as SGLang's kernel has it.

    Args:
        seed: [n] 64 bits; positions: [n]; col_indices: [m].

    Returns:
        [n, m] int64, each below 2**32.
    """
    seed = seed.to(torch.int64)
    h = torch.zeros_like(seed)
    for block in (seed & _32, (seed >> 32) & _32, positions.to(torch.int64) & _32):
        h = _mix(h, block)
    h = _mix(h[:, None], col_indices.to(torch.int64)[None, :] & _32) ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _32
    return h ^ (h >> 16)


def _mix(h: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    # int64 products wrap around; their low 32 bits are right.
    k = _rotated((block * 0xCC9E2D51) & _32, 15)
    h = _rotated(h ^ ((k * 0x1B873593) & _32), 13)
    return (h * 5 + 0xE6546B64) & _32


def _rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _32
