"""Log-probs and entropies of tokens from hidden states, with no [tokens, vocabulary] in memory.

Each tensor-parallel rank holds its own rows of hidden states and its slice of the vocabulary. Logits exist for
`chunk_tokens` tokens at a time (the token chunk size of the fused linear cross-entropy); backward computes them again.

    forward     a chunk of tokens at a time: all-gather its rows -> logits [chunk, vocab / TP] over the temperature
                -> maximum, sum exp(x - maximum), x - maximum at the label, sum (x - maximum) exp(x - maximum)
                one MAX all-reduce of the maxima, one SUM reduce-scatter of the rest: each rank ends with its own rows
    backward    one all-gather of hidden rows, one of (gradient, log sum exp); then a part of the vocabulary at a time:
                the logits of all rows again, their gradient, the output weight's gradient in one product, the hidden
                states' added up; one reduce-scatter of the latter

Chunks of tokens in backward would read and write the whole weight gradient, in float32, once a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Logits that are worked on at a time between two products: about a CPU's cache; on a GPU, enough for all its cores."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each label and entropy of each distribution softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [n, h], this rank's rows; n is the same on all ranks of the group. Any float type.
        weight: [vocab / TP, h], this rank's contiguous slice of the output layer.
        labels: [TP * n] int64, token ids of the whole vocabulary for the rows of all ranks, in rank order.
        chunk_tokens: so many rows' logits, over all ranks together, exist at a time.
        group: the tensor-parallel group.
        vocab: entries of the vocabulary; the rows from there on, on the last rank, pad the weight: they have no
            probability and a gradient of zero. None is TP * the slice's rows.

    Returns:
        (log-probs [n] with gradient to hidden and weight, entropies [n] without), of this rank's rows; float32, or
        float64 for float64 inputs. Sums over the vocabulary are taken in that type; matrix products take and give the
        inputs' type.
    """
    return _TokenLogprobs.apply(hidden, weight, labels, temperature, chunk_tokens, group, vocab)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
        group: dist.ProcessGroup,
        vocab: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs [n], entropies [n]) of this rank's rows; keeps [n] and [TP, n] numbers for backward."""
        tp, n = dist.get_world_size(group), hidden.size(0)
        first = dist.get_rank(group) * weight.size(0)
        labels = (labels - first).view(tp, n)
        padded, weight = weight, weight if vocab is None else weight[: vocab - first]
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        maximum = hidden.new_empty(tp, n, dtype=kind)
        rest = hidden.new_empty(tp, 3, n, dtype=kind)
        for rows in _chunks(n, tp, chunk_tokens):
            found = _statistics(_gather(hidden[rows], group), weight, labels[:, rows].reshape(-1), temperature, kind)
            maximum[:, rows] = found[0].view(tp, -1)
            rest[:, :, rows] = found[1:].view(3, tp, -1).transpose(0, 1)

        own = maximum
        if tp > 1:
            own = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        # Relative to the group's maximum instead of this rank's: x - maximum = (x - own) + (own - maximum).
        shift = own - maximum
        scale = shift.exp()
        total, target, weighted = rest.unbind(1)
        mine = (labels >= 0) & (labels < weight.size(0))
        rest = torch.stack([total * scale, (target + shift) * mine, (weighted + shift * total) * scale], dim=1)
        total, target, weighted = _reduce_scatter(rest, group)[0]

        ctx.save_for_backward(hidden, padded, labels, maximum[dist.get_rank(group)] + total.log())
        ctx.temperature, ctx.chunk_tokens, ctx.group, ctx.rows = temperature, chunk_tokens, group, weight.size(0)
        entropy = total.log() - weighted / total
        ctx.mark_non_differentiable(entropy)
        return target - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden [n, h] and weight [vocab / TP, h] from the log-probs' gradient [n]."""
        hidden, weight, labels, log_total = ctx.saved_tensors
        group, n = ctx.group, hidden.size(0)
        tp = labels.size(0)
        grads, log_totals = _gather(torch.stack([grad / ctx.temperature, log_total])[None], group).unbind(1)
        rows, (labels, grads, log_totals) = _gather(hidden, group), (x.reshape(-1) for x in (labels, grads, log_totals))
        grad_rows = torch.zeros_like(rows, dtype=log_total.dtype)  # many parts are added up: in float32
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.rows :] = 0
        size = max(1, ctx.chunk_tokens * ctx.rows // rows.size(0))
        for first in range(0, ctx.rows, size):
            part = slice(first, min(first + size, ctx.rows))
            columns = (labels - first, log_totals, grads, ctx.temperature)
            _gradients(rows, weight[part], *columns, grad_rows, grad_weight[part])
        grad_hidden = _reduce_scatter(grad_rows.to(hidden.dtype).view(tp, n, -1), group)[0]
        return grad_hidden, grad_weight, None, None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, kind: torch.dtype) -> torch.Tensor:
    logits = (hidden @ weight.T).to(kind)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows of the tensors, a block of logits at a time: several passes over one block stay in a CPU's cache, and a
    temporary of a block's size is small."""
    logits = tensors[0]
    block = BLOCK_BYTES[logits.device.type] // (logits.size(1) * logits.element_size())
    yield from zip(*(t.split(max(1, block)) for t in tensors), strict=True)


def _statistics(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float, kind: torch.dtype
) -> torch.Tensor:
    """[4, rows] of the logits x, with m their maximum: m; sum exp(x - m); x - m at the label (at an end of the slice if
    it is elsewhere); sum (x - m) exp(x - m)."""
    logits = _logits(hidden, weight, temperature, kind)
    return torch.cat([_row_statistics(*block) for block in _blocks(logits, labels)], dim=1)


def _row_statistics(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    maximum = x.amax(dim=-1)
    x.sub_(maximum[:, None])
    target = x.gather(1, labels.clamp(0, x.size(1) - 1)[:, None])[:, 0]
    exp = x.exp()
    return torch.stack([maximum, exp.sum(-1), target, x.mul_(exp).sum(-1)])


def _gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    log_totals: torch.Tensor,
    grads: torch.Tensor,
    temperature: float,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor,
) -> None:
    """What a part of the vocabulary gives: its weight's gradient is written to `grad_weight`, the hidden states' is
    added to `grad_hidden`."""
    logits = _logits(hidden, weight, temperature, log_totals.dtype)
    # In place, the gradient of sum(grads * log-probs) by the logits: grads * (one-hot - softmax).
    for x, log_total, grad in _blocks(logits, log_totals, grads):
        x.sub_(log_total[:, None]).exp_().mul_(-grad[:, None])
    mine = (labels >= 0) & (labels < logits.size(1))
    logits.scatter_add_(1, labels.clamp(0, logits.size(1) - 1)[:, None], (grads * mine)[:, None])
    logits = logits.to(weight.dtype)
    torch.mm(logits.T, hidden, out=grad_weight)
    if grad_hidden.dtype == weight.dtype:
        grad_hidden.addmm_(logits, weight)
    else:
        grad_hidden.add_(logits @ weight)


def _chunks(n: int, tp: int, chunk_tokens: int) -> Iterator[slice]:
    size = max(1, chunk_tokens // tp)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _gather(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[a, ...] of each rank -> [TP * a, ...] in rank order."""
    tp = dist.get_world_size(group)
    if tp == 1:
        return own
    out = own.new_empty(tp * own.size(0), *own.shape[1:])
    dist.all_gather_into_tensor(out, own.contiguous(), group=group)
    return out


def _reduce_scatter(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[TP, ...] of each rank -> [1, ...], the sum over ranks of this rank's part."""
    if dist.get_world_size(group) == 1:
        return parts
    out = parts.new_empty(1, *parts.shape[1:])
    dist.reduce_scatter_tensor(out, parts.contiguous(), group=group)
    return out
