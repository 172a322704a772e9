"""The sharded parameters -> whole Hugging Face tensors, one pipeline stage at a time."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel

from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.importer import named_parameters
from dapo_megatron.weights.table import Rule, from_shards, hf_shapes, rules


def export_stage(model: GPTModel, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather this stage's parameters over tensor parallelism, one at a time.

    Collective over the tensor-parallel group. Yields (Hugging Face name, whole tensor) on TP rank 0 and nothing on the
    others; the output layer of a tied model is skipped, because the embedding stands for it.
    """
    group = mpu.get_tensor_model_parallel_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    for rule, parameter in _exported(model, shape):
        data = parameter.detach()
        if is_float8tensor(data):  # a gather of its bytes would lose the scales
            data = dequantize_fp8_tensor(data)
        shards = [data]
        if size > 1 and rule.kind != "whole":
            shards = [torch.empty_like(data) for _ in range(size)] if rank == 0 else None
            dist.gather(data.contiguous(), shards, group=group, group_dst=0)
        if rank == 0:
            yield from zip(rule.hf, from_shards(rule, shape, shards), strict=True)


def export_names(model: GPTModel, shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) of what export_stage yields on TP rank 0, in the same order."""
    return [pair for rule, _ in _exported(model, shape) for pair in zip(rule.hf, hf_shapes(rule, shape), strict=True)]


def _exported(model: GPTModel, shape: ModelShape) -> Iterator[tuple[Rule, torch.nn.Parameter]]:
    table = rules(shape)
    for name, parameter in named_parameters(model).items():
        if not (name == "output_layer.weight" and shape.tied):
            yield table[name], parameter
