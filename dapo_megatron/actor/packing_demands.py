"""What the actor's layout and precision demand of packed micro-batches. Pure."""

from math import lcm

from dapo_megatron.actor.precision import RECIPES
from dapo_megatron.batching.packing_rules import PackingRules
from dapo_megatron.config import RunConfig


def packing_rules(config: RunConfig) -> PackingRules:
    """The rules of a layout and of its precision.

    Sequence parallelism cuts a context-parallel rank's tokens into TP equal parts, each of which FP8 wants to be a
    multiple of its own; zig-zag context parallelism cuts every sequence into 2 CP equal parts (megatron-core
    get_batch_on_this_cp_rank).
    """
    actor, recipe = config.actor, RECIPES.get(config.precision.fp8)
    tp, cp = actor.tensor_model_parallel_size, actor.context_parallel_size
    sequence_multiple = 2 * cp if cp > 1 else 1
    interleaved = actor.virtual_pipeline_model_parallel_size > 1
    return PackingRules(
        data_parallel_size=actor.data_parallel_size,
        micro_batch_tokens=actor.micro_batch_tokens,
        sequence_multiple=sequence_multiple,
        total_multiple=lcm(sequence_multiple, cp * tp * (recipe.tokens if recipe else 1)),
        equal_counts=actor.expert_model_parallel_size > 1 or (recipe is not None and recipe.exchanges),
        count_multiple=actor.pipeline_model_parallel_size if interleaved else 1,
        equal_lengths=interleaved,
    )
