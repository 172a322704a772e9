"""The sharded parameters -> whole Hugging Face tensors, one pipeline stage at a time."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel

from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.importer import named_parameters
from dapo_megatron.weights.stages import expert_copies, is_exported
from dapo_megatron.weights.table import ParameterMapping, from_shards, hf_shapes, parameter_mappings


def is_sender() -> bool:
    """Whether this rank gathers its pipeline stage: the first of all its tensor, context and data parallel ranks."""
    return mpu.get_tensor_model_parallel_rank() == mpu.get_data_parallel_rank(with_context_parallel=True) == 0


def export_stage(modules: Sequence[GPTModel], shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather this stage's parameters over tensor and expert parallelism, one at a time.

    Collective over all ranks of the stage. Yields (Hugging Face name, whole tensor) on the sender and nothing on the
    others; the output layer of a tied model is skipped, because the embedding stands for it.
    """
    table = parameter_mappings(shape)
    for mapping, parameter in _exported(modules, shape, table):
        if mapping.expert is None:
            if mpu.get_data_parallel_rank(with_context_parallel=True) != 0:
                continue
            group = mpu.get_tensor_model_parallel_group()
        else:
            # All slices of all experts with this place in their ranks: tensor parallel fastest, then expert parallel.
            group = mpu.get_expert_tensor_and_model_parallel_group()
        data = parameter.detach()
        if is_float8tensor(data):  # a gather of its bytes would lose the scales
            data = dequantize_fp8_tensor(data)
        shards = _gather(data, group)
        if not is_sender():
            continue
        copies = _copies(mapping, shape, table)
        slices = len(shards) // len(copies)
        for i, copy in enumerate(copies):
            yield from zip(copy.hf, from_shards(copy, shape, shards[i * slices : (i + 1) * slices]), strict=True)
        del shards  # before the next ones come


def export_names(modules: Sequence[GPTModel], shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) of what export_stage yields on the sender, in the same order."""
    table = parameter_mappings(shape)
    return [
        pair
        for mapping, _ in _exported(modules, shape, table)
        for copy in _copies(mapping, shape, table)
        for pair in zip(copy.hf, hf_shapes(copy, shape), strict=True)
    ]


def _exported(
    modules: Sequence[GPTModel], shape: ModelShape, table: dict[str, ParameterMapping]
) -> Iterator[tuple[ParameterMapping, torch.nn.Parameter]]:
    """In the table's order: the layers' own differs with their implementation, and the plan knows the table alone."""
    parameters = named_parameters(modules, shape)
    for name, mapping in table.items():
        if name in parameters and is_exported(name, shape):
            yield mapping, parameters[name]


def _copies(mapping: ParameterMapping, shape: ModelShape, table: dict[str, ParameterMapping]) -> list[ParameterMapping]:
    return expert_copies(mapping, shape, table, mpu.get_expert_model_parallel_world_size())


def _gather(data: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The slices of all ranks on the group's first rank."""
    if group.size() == 1:
        return [data]
    shards = [torch.empty_like(data) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(data.contiguous(), shards, group=group, group_dst=0)
    return shards or []
