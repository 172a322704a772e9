"""Do the engines hold the trainer's weights, bit for bit? One checksum for each parameter of each of an engine's ranks.

    every sender   gathers its stage once more, makes of it what each rank of an engine should hold, takes checksums
    every engine   takes those of what its ranks do hold: SGLang's /weights_checker

What log-probs hardly show, such as one key projection that is 5 % too large, is seen here, and named. Experts are left
out: SGLang pads, swaps, transposes or shuffles them, as its kernels want them.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch

from dapo_megatron.resharding.engine_parts import Part, engine_parts, vocabulary_rows
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import parameter_mappings

Checksum = Callable[[torch.Tensor], str]
_STACKED = ((re.compile(r"\.[qkv]_proj\."), ".qkv_proj."), (re.compile(r"\.(?:gate|up)_proj\."), ".gate_up_proj."))


def engine_parameter(name: str) -> str:
    """SGLang's name of the parameter that holds a Hugging Face tensor, no expert's."""
    for pattern, stacked in _STACKED:
        name = pattern.sub(stacked, name)
    return name


def find_checksum(device: torch.device) -> Checksum | None:
    """What SGLang takes of a tensor on such a device; None: it has one of its own there, and is not installed here."""
    if device.type == "cpu":
        return _of_bytes
    try:
        from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash
    except ImportError:
        return None
    return lambda tensor: f"{gpu_tensor_hash(tensor):016x}"


def expected_checksums(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shape: ModelShape,
    tp_size: int,
    dtype: torch.dtype,
    checksum: Checksum,
) -> dict[str, list[str]]:
    """{SGLang's parameter: its checksum on each rank of an engine}, of a stage's tensors.

    Args:
        tensors: whole Hugging Face tensors, as the trainer has them, in the table's order.
        dtype: of the engine's weights.
    """
    parts, found = _parts(shape, tp_size), {}
    plain = ((name, tensor) for name, tensor in tensors if ".experts." not in name)
    for parameter, members in groupby(plain, key=lambda pair: engine_parameter(pair[0])):
        ranks = [
            [_with_padding(name, tensor[part], shape, tp_size).to(dtype) for part in parts[name]]
            for name, tensor in members
        ]
        found[parameter] = [checksum(torch.cat(own)) for own in zip(*ranks, strict=True)]
    return found


def differing(expected: dict[str, list[str]], held: Sequence[dict[str, str]]) -> tuple[int, list[str]]:
    """(compared parameters, those that an engine holds otherwise on one of its ranks).

    Args:
        held: {SGLang's parameter: checksum} of each rank; those of a name that it does not have are left out.
    """
    pairs = [
        (name, ours, theirs[name])
        for name, sums in expected.items()
        for ours, theirs in zip(sums, held, strict=True)
        if name in theirs
    ]
    return len({name for name, _, _ in pairs}), list(dict.fromkeys(name for name, a, b in pairs if a != b))


def _of_bytes(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).digest()[:8].hex()


def _parts(shape: ModelShape, tp_size: int) -> dict[str, list[Part]]:
    """What each rank of an engine keeps of each Hugging Face tensor."""
    found: dict[str, list[Part]] = {}
    for mapping in parameter_mappings(shape).values():
        ranks = [engine_parts(mapping, shape, tp_size, rank) for rank in range(tp_size)]
        found |= {name: [parts[i] for parts in ranks] for i, name in enumerate(mapping.hf)}
    return found


def _with_padding(name: str, part: torch.Tensor, shape: ModelShape, tp_size: int) -> torch.Tensor:
    """A rank's rows of the vocabulary with the zeros that follow them; other tensors as they are."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return part
    return torch.nn.functional.pad(part, (0, 0, 0, vocabulary_rows(shape.vocab, tp_size) - len(part)))
