"""What a parallel layout demands of micro-batches: to which multiples they are padded, and how many there must be."""

from dataclasses import dataclass
from math import lcm

from dapo_megatron.config import RunConfig


@dataclass(frozen=True)
class PackingRules:
    """Fixed before a batch is built; none of them changes which sequences share an update, or a token's weight."""

    data_parallel_size: int
    micro_batch_tokens: int
    """Budget of one micro-batch in tokens, padding included; a longer sequence stands alone."""
    sequence_multiple: int = 1
    """Each sequence is padded to a multiple of it (context parallelism: 2 CP)."""
    total_multiple: int = 1
    """The sum of a micro-batch is padded to a multiple of it; a multiple of sequence_multiple."""
    equal_counts: bool = False
    """Every data-parallel rank gets the same number of micro-batches: in each of them, experts exchange tokens between
    the ranks, and FP8 with delayed scaling its maxima."""
    count_multiple: int = 1
    """The number of micro-batches is a multiple of it (interleaved pipeline: PP)."""
    equal_lengths: bool = False
    """All micro-batches of a rank have the same length (interleaved pipeline: stages exchange no shapes)."""


def packing_rules(config: RunConfig) -> PackingRules:
    """The rules of a layout and of its precision.

    Sequence parallelism cuts a context-parallel rank's tokens into TP equal parts, each of which FP8 wants to be a
    multiple of its own; zig-zag context parallelism cuts every sequence into 2 CP equal parts (megatron-core
    get_batch_on_this_cp_rank).
    """
    actor = config.actor
    tp, cp = actor.tensor_model_parallel_size, actor.context_parallel_size
    sequence_multiple = 2 * cp if cp > 1 else 1
    interleaved = actor.virtual_pipeline_model_parallel_size > 1
    return PackingRules(
        data_parallel_size=actor.data_parallel_size,
        micro_batch_tokens=actor.micro_batch_tokens,
        sequence_multiple=sequence_multiple,
        total_multiple=lcm(sequence_multiple, cp * tp * config.precision.token_multiple),
        equal_counts=actor.expert_model_parallel_size > 1 or config.precision.fp8 == "delayed",
        count_multiple=actor.pipeline_model_parallel_size if interleaved else 1,
        equal_lengths=interleaved,
    )
