"""What is demanded of micro-batches: to which multiples they are padded, and how many there must be."""

from dataclasses import dataclass


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
