"""Which rows of a micro-batch a rank works on, under context, tensor and sequence parallelism. Pure.

Context parallelism cuts every sequence into 2 CP chunks and gives rank r chunks r and 2 CP - 1 - r, so that causal
attention costs the same on all ranks (megatron-core get_batch_on_this_cp_rank; TransformerEngine's thd partition).
Sequence parallelism cuts what a context-parallel rank holds into TP equal contiguous parts. The token loss is evaluated
once for each trained label, by the one rank that `OwnRows` names.
"""

from dataclasses import dataclass

import numpy as np

from dapo_megatron.batching.batch import MicroBatch


def context_rows(cu_seqlens: np.ndarray, cp_size: int, cp_rank: int) -> np.ndarray:
    """Positions of a packed micro-batch that a context-parallel rank holds, in its order; [T / CP] int64.

    Args:
        cu_seqlens: [n + 1] boundaries; every sequence is a multiple of 2 CP tokens long if CP > 1.
    """
    if cp_size == 1:
        return np.arange(cu_seqlens[-1], dtype=np.int64)
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunk = (end - start) // (2 * cp_size)
        for c in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(np.arange(start + c * chunk, start + (c + 1) * chunk, dtype=np.int64))
    return np.concatenate(parts)


def context_order(cu_seqlens: np.ndarray, cp_size: int) -> np.ndarray:
    """Where each position of the packed micro-batch stands when the ranks' rows are concatenated; [T] int64."""
    gathered = np.concatenate([context_rows(cu_seqlens, cp_size, r) for r in range(cp_size)])
    order = np.empty_like(gathered)
    order[gathered] = np.arange(gathered.size)
    return order


@dataclass(frozen=True)
class OwnRows:
    """The trained labels of one micro-batch that one tensor-parallel rank evaluates.

    All ranks of the tensor-parallel group have the same number n of rows (at least 1); where there is less to do, rows
    are repeated and not `real`.
    """

    hidden: np.ndarray
    """Rows of the hidden states on this rank that go into the loss: [n] under sequence parallelism, [TP * n] without
    (there, every rank holds all rows and the group shares them out)."""
    labels: np.ndarray
    """[TP * n] int64: the labels of all ranks of the group, in rank order."""
    positions: np.ndarray
    """[n] int64: positions in the micro-batch of this rank's rows."""
    real: np.ndarray
    """[n] bool."""


def own_rows(
    micro_batch: MicroBatch, *, cp_size: int, cp_rank: int, tp_size: int, tp_rank: int, sequence_parallel: bool
) -> OwnRows:
    """Share out the active labels of this context-parallel rank among its tensor-parallel ranks."""
    held = context_rows(micro_batch.cu_seqlens, cp_size, cp_rank)
    active = np.flatnonzero(micro_batch.active[held])
    if sequence_parallel:
        part = held.size // tp_size
        shares = [active[active // part == r] for r in range(tp_size)]
    else:
        shares = np.array_split(active, tp_size)
    n = max(1, *(share.size for share in shares))
    rows = np.stack([np.pad(share, (0, n - share.size)) for share in shares])  # [TP, n], in this rank's order
    if sequence_parallel:
        # A repeated row is the rank's own first one, which has not the number 0.
        offsets = np.arange(tp_size)[:, None] * part
        rows = np.maximum(rows, offsets)
        hidden = rows[tp_rank] - offsets[tp_rank]
    else:
        hidden = rows.reshape(-1)
    return OwnRows(
        hidden=hidden,
        labels=micro_batch.labels[held[rows]].reshape(-1),
        positions=held[rows[tp_rank]],
        real=np.arange(n) < shares[tp_rank].size,
    )
