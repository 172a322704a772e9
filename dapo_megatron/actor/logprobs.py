"""Log-probabilities and entropies of tokens from logits whose vocabulary is split over tensor-parallel ranks."""

import torch
import torch.distributed as dist


def vocab_parallel_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each label and entropy of each distribution softmax(logits / temperature).

    Args:
        logits: [t, vocab / TP], this rank's contiguous slice of the vocabulary, any float type.
        labels: [t] int64, token ids of the whole vocabulary.
        group: the tensor-parallel group.

    Returns:
        (log-probs [t] with gradient, entropies [t] without), float32 (float64 for float64 logits), equal on all ranks.
    """
    return _VocabParallelLogprobs.apply(logits, labels, temperature, group)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, group):
        x = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        slice_size = x.size(-1)
        local = labels - dist.get_rank(group) * slice_size
        mine = (local >= 0) & (local < slice_size)
        local = local.clamp(0, slice_size - 1)

        peak = x.amax(dim=-1)
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        x -= peak[:, None]
        exp = x.exp()
        target = x.gather(1, local[:, None])[:, 0] * mine
        sums = torch.stack([exp.sum(-1), target, (exp * x).sum(-1)])
        dist.all_reduce(sums, group=group)
        total, target, weighted = sums

        ctx.save_for_backward(exp.div_(total[:, None]), local, mine)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        logprobs = target - total.log()
        entropy = total.log() - weighted / total
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        softmax, local, mine = ctx.saved_tensors
        scaled = grad / ctx.temperature
        out = softmax * -scaled[:, None]
        out.scatter_add_(1, local[:, None], (scaled * mine)[:, None])
        return out.to(ctx.dtype), None, None, None
