"""Bytes of a checkpoint, and of host memory while it is made. Pure."""

from dataclasses import dataclass
from math import prod

from dapo_megatron.actor.memory import FLOAT, ITEM, shards, stage_parameters
from dapo_megatron.config import RunConfig
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import hf_names, hf_shapes, parameter_mappings

OPTIMIZER = 3 * FLOAT
"""Of each parameter: its float32 master and AdamW's two moments."""


@dataclass(frozen=True)
class SaveBytes:
    """What one checkpoint takes."""

    disk: int
    """All its tensors."""
    copy: int
    """Host memory of one rank until its part is written: about its equal share."""
    gather: int
    """Host memory that one rank of the fullest stage needs besides while a fully_reshardable one is gathered: the
    optimizer's tensors of the stage whole, its own part of them, and one tensor twice on its way from the GPU."""


def save_bytes(config: RunConfig, shape: ModelShape) -> SaveBytes:
    """Of the configuration's layout."""
    actor = config.actor
    disk = weight_elements(shape) * (ITEM[config.model.dtype] + OPTIMIZER)
    dense, experts = shards(actor)
    gathers = []
    for stage in range(actor.pipeline_model_parallel_size):
        counts = stage_parameters(actor, shape, stage)
        own = counts.dense // dense + counts.experts // experts
        gathers.append(OPTIMIZER * (counts.total + own) + 2 * FLOAT * max(counts.dense, counts.experts))
    return SaveBytes(disk, disk // actor.world_size, max(gathers))


def weight_elements(shape: ModelShape) -> int:
    """Elements of the Hugging Face checkpoint's tensors, a tied embedding once."""
    sizes = {
        name: prod(size)
        for mapping in parameter_mappings(shape).values()
        for name, size in zip(mapping.hf, hf_shapes(mapping, shape), strict=True)
    }
    assert sizes.keys() == hf_names(shape)
    return sum(sizes.values())
