"""The token loss against log_softmax over the whole vocabulary, on one rank and on several."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks

from dapo_megatron.actor.token_loss import token_logprobs

ROWS, HIDDEN, VOCAB, TEMPERATURE = 7, 5, 12, 0.7


def problem(kind, rows=ROWS, vocab=VOCAB):
    """(hidden of both ranks' rows, output weight, labels, a gradient for the log-probs)."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * rows, HIDDEN, generator=g, dtype=torch.float64) * 3
    weight = torch.randn(vocab, HIDDEN, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocab, (2 * rows,), generator=g)
    grad = torch.randn(2 * rows, generator=g, dtype=torch.float64)
    return hidden.to(kind), weight.to(kind), labels, grad


def truth(kind, *size):
    hidden, weight, labels, grad = problem(kind, *size)  # rounded to `kind`: what is left is the loss's own error
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    table = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    logprobs = table.gather(1, labels[:, None])[:, 0]
    logprobs.backward(grad)
    return logprobs.detach(), -(table.exp() * table).sum(-1).detach(), hidden.grad, weight.grad


def on_rank(kind, chunk, *size):
    """This rank's log-probs, entropies, and the gradients of its rows and of its slice of the weight."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, grad = problem(kind, *size)
    vocab, rows, slice_ = len(weight), len(hidden) // world, -(-len(weight) // world)
    # Rows beyond the vocabulary: whatever they hold must not count.
    weight = torch.cat([weight, weight.new_full((world * slice_ - vocab, HIDDEN), 50.0)])
    hidden = hidden[rank * rows : (rank + 1) * rows].requires_grad_()
    weight = weight[rank * slice_ : (rank + 1) * slice_].requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, labels, TEMPERATURE, chunk, dist.group.WORLD, vocab)
    logprobs.backward(grad[rank * rows : (rank + 1) * rows].to(logprobs.dtype))
    return [t.detach().double().numpy() for t in (logprobs, entropy, hidden.grad, weight.grad)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunk", [1, 6, 100])
@pytest.mark.parametrize(("kind", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_equals_log_softmax(world, chunk, kind, atol):
    parts = zip(*run_ranks(world, on_rank, kind, chunk), strict=True)
    for got, expected in zip(parts, truth(kind), strict=True):
        torch.testing.assert_close(torch.cat([torch.from_numpy(p) for p in got]), expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("chunk", [1, 6, 100])
def test_rows_beyond_the_vocabulary_have_no_probability_and_no_gradient(chunk):
    *parts, weights = zip(*run_ranks(2, on_rank, torch.float64, chunk, ROWS, 11), strict=True)
    *expected, weight = truth(torch.float64, ROWS, 11)
    for got, want in zip(parts, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.concatenate(got)), want, atol=1e-12, rtol=1e-12)
    weights = torch.from_numpy(np.concatenate(weights))
    torch.testing.assert_close(weights[:11], weight, atol=1e-12, rtol=1e-12)
    assert weights[11].tolist() == [0.0] * HIDDEN


def test_many_parts_of_the_vocabulary_cost_no_accuracy_in_bfloat16():
    """The hidden states' gradient of 128 parts is added up in float32 (in bfloat16 it would miss the bound); the
    weight's is one product however many there are."""
    (one,), (many,) = (run_ranks(1, on_rank, torch.bfloat16, chunk, 64, 256) for chunk in (1000, 1))
    for i, bound in ((2, 2.8e-3), (3, 1e-4)):
        assert np.linalg.norm(one[i] - many[i]) <= bound * np.linalg.norm(one[i])


def check_gradients():
    """gradcheck of this rank's own loss, of both inputs, in float64."""
    hidden, weight, labels, _ = problem(torch.float64)
    return torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, labels[:ROWS], TEMPERATURE, 3, dist.group.WORLD)[0],
        (hidden[:ROWS].requires_grad_(), weight.requires_grad_()),
    )


def test_gradcheck():
    assert run_ranks(1, check_gradients) == [True]


def same_numbers_with_and_without_gradient():
    hidden, weight, labels, _ = problem(torch.float32)
    with torch.no_grad():
        before, _ = token_logprobs(hidden, weight, labels, 1.0, 4, dist.group.WORLD)
    after, _ = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), labels, 1.0, 4, dist.group.WORLD)
    return torch.equal(before, after)


def test_scoring_and_training_give_the_same_bits():
    assert run_ranks(1, same_numbers_with_and_without_gradient) == [True]
