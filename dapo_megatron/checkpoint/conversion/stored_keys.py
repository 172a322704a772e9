"""Where a parameter stands in a distributed checkpoint: megatron-core's keys, without building a model.

megatron-core stacks the layers of a model: `decoder.layers.3.mlp.linear_fc2.weight` [h, f] is the slice [3, :, :] of
the stored tensor `decoder.layers.mlp.linear_fc2.weight` [layers, h, f], and experts stand on a second axis
(transformer_block.py, moe/experts.py: sharded_state_dict). Beside the tensors stand objects, one a linear layer and
norm: TransformerEngine's extra state, which is None for whoever has none but is asked for by every load.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from dapo_megatron.errors import DapoError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import ALIASES, ParameterMapping, hf_names, hf_shapes, parameter_mappings, some_names

WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""How keys of weights begin; those of the optimizer and of its schedule begin otherwise."""


@dataclass(frozen=True)
class Place:
    """One parameter's slice of a stored tensor."""

    key: str
    index: tuple[int, ...]
    """Numbers of the layer and of the expert: the offsets on the stacked axes."""
    stacked: tuple[int, ...]
    """Sizes of those axes."""
    shape: tuple[int, ...]
    """Of the parameter with one tensor-parallel rank and no padding."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the whole stored tensor."""
        return self.stacked + self.shape


def places(shape: ModelShape) -> list[tuple[ParameterMapping, Place]]:
    """Every parameter that a checkpoint holds; the output layer of a tied model is the embedding."""
    return [
        (mapping, _place(mapping, shape))
        for mapping in parameter_mappings(shape).values()
        if not (shape.tied and mapping.megatron == "output_layer.weight")
    ]


def account(table: list[tuple[ParameterMapping, Place]], shape: ModelShape) -> None:
    """Every Hugging Face tensor is used once, and every slice of every stored tensor is filled once.

    Raises:
        DapoError: lists the tensors that are not.
    """
    used = Counter(name for mapping, _ in table for name in mapping.hf)
    filled = Counter((place.key, place.index) for _, place in table)
    sizes = {place.key: place.stacked for _, place in table}
    wanted = {(key, index) for key, stacked in sizes.items() for index in product(*map(range, stacked))}
    faults = [f"{name} is used {used[name]} times" for name in sorted(hf_names(shape) | used.keys()) if used[name] != 1]
    for key, index in sorted(wanted | filled.keys()):
        if filled[key, index] != 1:
            faults.append(f"{key} {index} is filled {filled[key, index]} times")
    if faults:
        raise DapoError(f"the table of {shape.family.architecture} is wrong: {some_names(faults, order=False)}")


def _place(mapping: ParameterMapping, shape: ModelShape) -> Place:
    key, index = _stacked(mapping.megatron, shape)
    sizes = hf_shapes(mapping, shape)
    own = (sum(size[0] for size in sizes), *sizes[0][1:])
    stacked = (shape.layers, shape.experts.count if shape.experts else 1)[: len(index)]
    return Place(key, index, stacked, own)


def _stacked(name: str, shape: ModelShape) -> tuple[str, tuple[int, ...]]:
    """megatron-core's key of a name of the table, and its place on the stacked axes."""
    if shape.experts is None:  # with experts the norm before them is a module of its own
        name = name.replace(ALIASES[1][1], ALIASES[1][0])
    name = name.replace(ALIASES[0][1], ALIASES[0][0])
    index = tuple(int(n) for n in re.findall(r"(?:layers|local_experts)\.(\d+)\.", name))
    return re.sub(r"layers\.\d+\.", "layers.", re.sub(r"local_experts\.\d+\.", "experts.", name)), index


_STATELESS = (".router.weight", "embedding.word_embeddings.weight", "output_layer.weight", ".norm.weight")


def object_keys(shape: ModelShape) -> Iterator[str]:
    """Keys of the extra state that megatron-core's layers ask for, torch's or TransformerEngine's.

    One for each linear layer and norm: `<key>._extra_state/shard_<index>_<sizes>` (mapping.py: ShardedObject).
    """
    for _, place in places(shape):
        if not place.key.endswith(".weight") or place.key.endswith(_STATELESS):
            continue
        index, sizes = place.index or (0,), place.stacked or (1,)
        yield f"{place.key.removesuffix('weight')}_extra_state/shard_{_dotted(index)}_{_dotted(sizes)}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
