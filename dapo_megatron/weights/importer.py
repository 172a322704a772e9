"""Hugging Face folder -> the parameters of one rank, tensor by tensor."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from dapo_megatron.errors import DapoError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import Rule, canonical_name, check_names, hf_shapes, rules, to_shard


class HfFolder:
    """The tensors of a Hugging Face checkpoint folder, read one at a time.

    Raises:
        DapoError: no safetensors, a shard that its index names is missing, or an unreadable file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            absent = sorted({f for f in self.files.values() if not (self.path / f).exists()})
            if absent:
                raise DapoError(f"{index} names {absent[0]}, which does not exist: download the checkpoint again")
        elif (self.path / "model.safetensors").exists():
            with self._open("model.safetensors") as f:
                self.files = dict.fromkeys(f.keys(), "model.safetensors")
        else:
            raise DapoError(f"{self.path}: no model.safetensors and no index: give a Hugging Face checkpoint folder")

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, in its own type."""
        with self._open(self.files[name]) as f:
            return f.get_tensor(name)

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except SafetensorError as e:
            raise DapoError(f"{self.path / file} is not a readable safetensors file: {e}") from None


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
        DapoError: a tensor is missing, unexpected or of the wrong shape.
    """
    folder = HfFolder(path)
    check_names(set(folder.files), shape, str(path))
    table = rules(shape)
    exact: dict[torch.nn.Parameter, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in named_parameters(modules, shape).items():
            rule = table[name]
            tensors = [folder.tensor(n) for n in rule.hf]
            for hf_name, tensor, expected in zip(rule.hf, tensors, hf_shapes(rule, shape), strict=True):
                if tuple(tensor.shape) != expected:
                    raise DapoError(f"{path}: {hf_name} has shape {tuple(tensor.shape)}, config.json says {expected}")
            group = tensor_parallel_group(rule)
            shard = to_shard(rule, shape, tensors, group.size(), group.rank())
            parameter.copy_(shard)
            if is_float8tensor(parameter):
                exact[parameter] = shard
    return {name: exact.get(p, p) for name, p in modules[0].named_parameters()} if exact else None


def tensor_parallel_group(rule: Rule) -> dist.ProcessGroup:
    """The ranks that hold the slices of a parameter."""
    if rule.expert is None:
        return mpu.get_tensor_model_parallel_group()
    return mpu.get_expert_tensor_parallel_group()
