"""Which part of every tensor each of an engine's ranks keeps: SGLang's tensor parallelism. Pure."""

from math import prod

from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import ParameterMapping, hf_shapes

VOCAB_PADDING = 64
"""Rows of the vocabulary that SGLang pads to (vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""
Part = tuple[slice, ...]
"""Of a tensor, one slice a dimension."""


def check_engine_layout(shape: ModelShape, tp_size: int) -> None:
    """Whether an engine can share the model's tensors so.

    Raises:
        ConfigError: one line that names both numbers.
    """
    widths = [("attention heads", shape.heads), ("channels of the MLP", shape.ffn)]
    if shape.experts is not None:
        widths[1] = ("channels of an expert", shape.experts.ffn)
    for what, count in widths:
        if count % tp_size:
            raise ConfigError(f"engine.tensor_parallel_size={tp_size} does not divide the model's {count} {what}")
    if shape.kv_heads % tp_size and tp_size % shape.kv_heads:
        raise ConfigError(
            f"engine.tensor_parallel_size={tp_size} neither divides the model's {shape.kv_heads} key-value heads nor "
            "is a multiple of them"
        )


def engine_parts(mapping: ParameterMapping, shape: ModelShape, tp_size: int, rank: int) -> list[Part]:
    """What one rank of an engine keeps of each of a rule's Hugging Face tensors, in their order.

    Where there are more ranks than key-value heads, several ranks keep the same head.
    """
    sizes = hf_shapes(mapping, shape)
    if mapping.kind == "qkv":
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)
        return [_rows(_heads(n, tp_size, rank), shape.head_dim, size) for n, size in zip(counts, sizes, strict=True)]
    return [_part(mapping, size, tp_size, rank) for size in sizes]


def kept_bytes(mapping: ParameterMapping, shape: ModelShape, tp_size: int, rank: int, item_bytes: int) -> int:
    """Bytes of what one rank keeps of a rule's tensors."""
    parts = engine_parts(mapping, shape, tp_size, rank)
    return item_bytes * sum(prod(s.stop - s.start for s in part) for part in parts)


def vocabulary_rows(count: int, tp_size: int) -> int:
    """Rows of the embedding, and of the output layer, that each rank holds; zeros where the vocabulary has ended."""
    padding = VOCAB_PADDING if _padded(count, VOCAB_PADDING) % tp_size == 0 else VOCAB_PADDING * tp_size
    return _padded(count, padding) // tp_size


def _heads(count: int, tp_size: int, rank: int) -> slice:
    if count >= tp_size:
        return slice(rank * (count // tp_size), (rank + 1) * (count // tp_size))
    head = rank // (tp_size // count)
    return slice(head, head + 1)


def _rows(heads: slice, head_dim: int, size: tuple[int, ...]) -> Part:
    return (slice(heads.start * head_dim, heads.stop * head_dim), *(slice(0, n) for n in size[1:]))


def _part(mapping: ParameterMapping, size: tuple[int, ...], tp_size: int, rank: int) -> Part:
    whole = tuple(slice(0, n) for n in size)
    match mapping.kind:
        case "rows":
            return (_vocabulary(size[0], tp_size, rank), *whole[1:])
        case "gate_up":
            return (_share(size[0], tp_size, rank), *whole[1:])
        case "columns":
            return (whole[0], _share(size[1], tp_size, rank))
    return whole  # OLMo 2's norms over all heads too, which the trainer slices


def _share(count: int, tp_size: int, rank: int) -> slice:
    return slice(rank * (count // tp_size), (rank + 1) * (count // tp_size))


def _vocabulary(count: int, tp_size: int, rank: int) -> slice:
    """Padded first, so that the last ranks may have fewer rows, or none."""
    each = vocabulary_rows(count, tp_size)
    return slice(min(rank * each, count), min((rank + 1) * each, count))


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
