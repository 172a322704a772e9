"""Hugging Face folder -> the parameters of one rank, tensor by tensor."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel

from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_folder import HfFolder, check_weights
from dapo_megatron.weights.table import ParameterMapping, canonical_name, parameter_mappings, to_shard


def named_parameters(modules: Sequence[GPTModel], shape: ModelShape) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters, of all model chunks of its pipeline stage, by the table's names."""
    first_expert = local_experts(shape) * mpu.get_expert_model_parallel_rank()
    return {
        canonical_name(name, module.decoder.layers[0].layer_number - 1, first_expert): parameter
        for module in modules
        for name, parameter in module.named_parameters()
    }


def local_experts(shape: ModelShape) -> int:
    """Experts of each layer that one rank holds."""
    return shape.experts.count // mpu.get_expert_model_parallel_world_size() if shape.experts else 0


def load_hf_weights(path: str | Path, modules: Sequence[GPTModel], shape: ModelShape) -> dict[str, torch.Tensor] | None:
    """Copy the checkpoint into this rank's parameters; one tensor is in memory at a time.

    Returns:
        None, or where parameters are kept in FP8 (one module, no experts) all of them by megatron-core's own names,
        these as the checkpoint has them (on the CPU): what the optimizer's float32 masters start from, since FP8 has
        lost it.

    Raises:
        DapoError: see check_weights.
    """
    folder = HfFolder(path)
    check_weights(folder, shape)
    table = parameter_mappings(shape)
    exact: dict[torch.nn.Parameter, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in named_parameters(modules, shape).items():
            mapping = table[name]
            tensors = [folder.tensor(n) for n in mapping.hf]
            group = tensor_parallel_group(mapping)
            shard = to_shard(mapping, shape, tensors, group.size(), group.rank())
            parameter.copy_(shard)
            if is_float8tensor(parameter):
                exact[parameter] = shard
    return {name: exact.get(p, p) for name, p in modules[0].named_parameters()} if exact else None


def tensor_parallel_group(mapping: ParameterMapping) -> dist.ProcessGroup:
    """The ranks that hold the slices of a parameter."""
    if mapping.expert is None:
        return mpu.get_tensor_model_parallel_group()
    return mpu.get_expert_tensor_parallel_group()
