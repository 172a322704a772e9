"""Which parameters each pipeline stage sends, in which order: those of the table, in the table's order. Pure."""

import re
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import ParameterMapping, parameter_mappings

T = TypeVar("T")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def stage_mappings(shape: ModelShape, stages: int, chunks: int = 1) -> list[list[ParameterMapping]]:
    """What each pipeline stage exports, all experts of a layer included; a tied output layer is left out.

    Args:
        stages: pipeline-parallel size.
        chunks: model chunks of a stage (VPP); chunk c of stage s is the (c x stages + s)-th part of the layers.
    """
    out: list[list[ParameterMapping]] = [[] for _ in range(stages)]
    each = shape.layers // (stages * chunks)
    for mapping in parameter_mappings(shape).values():
        if found := _LAYER.match(mapping.megatron):
            out[int(found[1]) // each % stages].append(mapping)
        elif mapping.megatron.startswith("embedding."):
            out[0].append(mapping)
        elif is_exported(mapping.megatron, shape):
            out[-1].append(mapping)
    return out


def is_exported(name: str, shape: ModelShape) -> bool:
    """Whether a parameter is sent at all: for a tied output layer, which the last stage has too, the embedding is."""
    return not (name == "output_layer.weight" and shape.tied)


def expert_copies(
    mapping: ParameterMapping, shape: ModelShape, table: dict[str, ParameterMapping], ep_size: int
) -> list[ParameterMapping]:
    """The rules of the parameters at this one's place on all expert-parallel ranks, in their order; others stand alone.

    Args:
        mapping: of an expert of the first expert-parallel rank.
    """
    if mapping.expert is None or shape.experts is None:
        return [mapping]
    here, each = f".local_experts.{mapping.expert}.", shape.experts.count // ep_size
    return [
        table[mapping.megatron.replace(here, f".local_experts.{expert}.")]
        for expert in range(mapping.expert % each, shape.experts.count, each)
    ]


def gathered_together(parameters: Iterable[tuple[T, Hashable, int]], most: int) -> Iterator[list[T]]:
    """Cut a stage's parameters into those that one collective gathers, in their order; a larger one goes alone.

    Args:
        parameters: (parameter, what all of one collective have in common, bytes of its shards).
        most: bytes of the shards that arrive at the sender in one collective.
    """
    now: list[T] = []
    kind, size = None, 0
    for parameter, own_kind, own_size in parameters:
        if now and (own_kind != kind or size + own_size > most):
            yield now
            now, size = [], 0
        now.append(parameter)
        kind, size = own_kind, size + own_size
    if now:
        yield now
