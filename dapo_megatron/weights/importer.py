"""Hugging Face folder -> the parameters of one rank, tensor by tensor."""

import json
from pathlib import Path

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from dapo_megatron.errors import DapoError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import canonical_name, check_names, hf_shapes, rules, to_shard


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

    def _open(self, file: str):
        try:
            return safe_open(self.path / file, framework="pt")
        except SafetensorError as e:
            raise DapoError(f"{self.path / file} is not a readable safetensors file: {e}") from None


def named_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of one pipeline stage by the table's names."""
    first = model.decoder.layers[0].layer_number - 1
    return {canonical_name(name, first): parameter for name, parameter in model.named_parameters()}


def load_hf_weights(
    path: str | Path, model: GPTModel, shape: ModelShape, tp_size: int, tp_rank: int
) -> dict[str, torch.Tensor] | None:
    """Copy the checkpoint into this rank's parameters; one tensor is in memory at a time.

    Returns:
        None, or where parameters are kept in FP8 all of them by megatron-core's own names, these as the checkpoint has
        them (on the CPU): what the optimizer's float32 masters start from, since FP8 has lost it.

    Raises:
        DapoError: a tensor is missing, unexpected or of the wrong shape.
    """
    folder = HfFolder(path)
    check_names(set(folder.files), shape, str(path))
    table = rules(shape)
    exact: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for (own_name, parameter), name in zip(model.named_parameters(), named_parameters(model), strict=True):
            rule = table[name]
            tensors = [folder.tensor(n) for n in rule.hf]
            for hf_name, tensor, expected in zip(rule.hf, tensors, hf_shapes(rule, shape), strict=True):
                if tuple(tensor.shape) != expected:
                    raise DapoError(f"{path}: {hf_name} has shape {tuple(tensor.shape)}, config.json says {expected}")
            shard = to_shard(rule, shape, tensors, tp_size, tp_rank)
            parameter.copy_(shard)
            exact[own_name] = shard if is_float8tensor(parameter) else parameter
    return exact if any(map(is_float8tensor, model.parameters())) else None
