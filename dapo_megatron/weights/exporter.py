"""The sharded parameters -> whole Hugging Face tensors, one pipeline stage at a time."""

from collections.abc import Hashable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel

from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.importer import named_parameters
from dapo_megatron.weights.stages import expert_copies, gathered_together, is_exported
from dapo_megatron.weights.table import ParameterMapping, from_shards, hf_shapes, parameter_mappings


def is_sender() -> bool:
    """Whether this rank gathers its pipeline stage: the first of all its tensor, context and data parallel ranks."""
    return mpu.get_tensor_model_parallel_rank() == mpu.get_data_parallel_rank(with_context_parallel=True) == 0


def export_stage(
    modules: Sequence[GPTModel], shape: ModelShape, gather_bytes: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather this stage's parameters over tensor and expert parallelism, a few at a time.

    Collective over all ranks of the stage. Yields (Hugging Face name, whole tensor) on the sender and nothing on the
    others; the output layer of a tied model is skipped, because the embedding stands for it.

    Args:
        gather_bytes: of shards that the sender may hold at once; a larger parameter is gathered alone.
    """
    table = parameter_mappings(shape)
    sized = ((pair, _kind(*pair), pair[1].nbytes * _group(pair[0]).size()) for pair in _exported(modules, shape, table))
    for pairs in gathered_together(sized, gather_bytes):
        first, _ = pairs[0]
        if first.expert is None and mpu.get_data_parallel_rank(with_context_parallel=True) != 0:
            continue
        shards = _gather([_plain(parameter) for _, parameter in pairs], _group(first))
        if not is_sender():
            continue
        for (mapping, _), own in zip(pairs, shards, strict=True):
            copies = _copies(mapping, shape, table)
            slices = len(own) // len(copies)
            for i, copy in enumerate(copies):
                yield from zip(copy.hf, from_shards(copy, shape, own[i * slices : (i + 1) * slices]), strict=True)
        del shards, own  # before the next ones come


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


def _group(mapping: ParameterMapping) -> dist.ProcessGroup:
    """The ranks that have a shard of a parameter, or of the experts that stand at its place."""
    if mapping.expert is None:
        return mpu.get_tensor_model_parallel_group()
    # All slices of all experts with this place in their ranks: tensor parallel fastest, then expert parallel.
    return mpu.get_expert_tensor_and_model_parallel_group()


def _kind(mapping: ParameterMapping, parameter: torch.nn.Parameter) -> Hashable:
    """What parameters that are gathered together have in common."""
    return mapping.expert is None, parameter.dtype


def _plain(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values: of an FP8 parameter a gather of its bytes would lose the scales."""
    data = parameter.detach()
    return dequantize_fp8_tensor(data) if is_float8tensor(data) else data


def _gather(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> list[list[torch.Tensor]]:
    """Of each tensor, its slices of all ranks, on the group's first rank; the others get none.

    A collective of point-to-point transfers: gloo's own gather copies all slices once more, into fresh memory.
    """
    if group.size() == 1:
        return [[tensor] for tensor in tensors]
    flat = torch.cat([t.reshape(-1) for t in tensors]) if len(tensors) > 1 else tensors[0].contiguous().view(-1)
    if group.rank() != 0:
        _transfer([dist.P2POp(dist.isend, flat, group=group, group_peer=0)])
        return [[] for _ in tensors]
    ranks = [flat, *(torch.empty_like(flat) for _ in range(1, group.size()))]
    _transfer([dist.P2POp(dist.irecv, ranks[r], group=group, group_peer=r) for r in range(1, group.size())])
    sizes = [t.numel() for t in tensors]
    slices = zip(*(rank.split(sizes) for rank in ranks), strict=True)
    return [[s.view(t.shape) for s in own] for own, t in zip(slices, tensors, strict=True)]


def _transfer(operations: list[dist.P2POp]) -> None:
    # As one batch, for which NCCL uses the group's communicator; single ones would make one for each pair of ranks.
    for request in dist.batch_isend_irecv(operations):
        request.wait()
