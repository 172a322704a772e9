"""Sums over the state of a training run that come out the same under any layout: was everything restored?

A sum adds up the bit patterns of all elements, modulo 2^64. The order of adding and padding with zeros do not change
it; what several ranks hold in common is counted once, by megatron-core's own rule for gradient norms.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared

from dapo_megatron.distributed.agreement import sum_over_ranks
from dapo_megatron.distributed.layout import Layout

STATES = ("param", "exp_avg", "exp_avg_sq")
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def optimizer_sums(optimizer: MegatronOptimizer, layout: Layout) -> dict[str, int]:
    """Sum of each optimizer state over all parameters of the model, and the optimizer's step; collective."""
    sums = {name: 0 for name in STATES}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in _own_parameters(part):
            for name, state in part._get_main_param_and_optimizer_states(parameter).items():
                if name in sums:
                    sums[name] += bit_sum(state)
    total = torch.tensor([_signed(sums[name]) for name in STATES])
    sum_over_ranks("adding up the optimizer's state", total, layout)
    step = torch.tensor(max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0))
    dist.all_reduce(step, dist.ReduceOp.MAX, group=layout.control)
    return dict(zip(STATES, total.tolist(), strict=True)) | {"step": int(step)}


def random_sum(states: dict[str, torch.Tensor], layout: Layout) -> int:
    """Sum of the hashes of all ranks' random states; collective."""
    own = sum(xxhash.xxh3_64_intdigest(state.numpy().tobytes()) for state in states.values())
    total = torch.tensor([_signed(own)])
    sum_over_ranks("adding up the random states", total, layout)
    return int(total)


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the bit patterns of a tensor's elements, as integers of their size."""
    bits = tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])
    if bits.is_cpu:  # numpy adds in 64 bits without a copy, ten times faster than torch does here
        return int(bits.numpy().sum(dtype=np.int64))
    return int(bits.sum(dtype=torch.int64))


def _own_parameters(optimizer: MegatronOptimizer) -> Iterator[torch.nn.Parameter]:
    """Parameters of which this rank holds a part of the state, and no other rank holds the same part."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter in bucket["param_map"]:
                    if param_is_not_shared(parameter) and tensor_parallel.param_is_not_tensor_parallel_duplicate(
                        parameter
                    ):
                        yield parameter


def _signed(value: int) -> int:
    """The number modulo 2^64, as a signed one."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
