"""The policy's loss per token by hand, with truncated importance sampling between engine and trainer."""

import math

import pytest
import torch

from dapo_megatron.actor.training_objective import PolicyObjective, TrainedTokens
from dapo_megatron.config import AlgorithmConfig

# Of each token: current over old policy, old policy over engine (r), advantage A; loss = -A ratio min(r, 1.5).
TOKENS = [
    (1.0, 1.0, 2.0, -2.0),
    (1.1, 1.25, 2.0, -2.75),  # the trainer likes the token more than the engine did
    (1.1, 0.5, 2.0, -1.1),  # ... and less
    (0.9, 4.0, -1.0, 1.35),  # truncated: 1.5 instead of 4
    (0.95, 1.75, 1.0, -1.425),  # truncated by this cap, not by the default one
    (0.9, 0.25, -1.0, 0.225),
    (2.0, 0.5, 1.0, -0.64),  # clipped at 1.28
]


def column(values):
    return torch.tensor(list(values), dtype=torch.float32)


@pytest.mark.parametrize("cap", [1.5, None])
def test_the_loss_carries_the_importance_weight(cap):
    ratio, apart, advantage, loss = zip(*TOKENS, strict=True)
    old = column(math.log(0.1) for _ in TOKENS)
    logprobs = (old + column(map(math.log, ratio))).requires_grad_()
    tokens = TrainedTokens(
        logprobs=logprobs,
        entropy=torch.zeros(len(TOKENS)),
        old_logprobs=old,
        rollout_logprobs=old - column(map(math.log, apart)),
        advantages=column(advantage),
    )
    found = PolicyObjective(AlgorithmConfig(clip_high=0.28, importance_cap=cap))(tokens)
    if cap is None:
        loss = [x / min(a, 1.5) for x, a in zip(loss, apart, strict=True)]
    torch.testing.assert_close(found.loss, column(loss))
    # The loss is proportional to the ratio, where it is not clipped: so its derivative by the log-prob is the loss.
    (gradient,) = torch.autograd.grad(found.loss.sum(), logprobs)
    torch.testing.assert_close(gradient, column([*loss[:-1], 0.0]))
    truncated = [float(a > (cap or 2.0)) for a in apart]
    assert found.means["mismatch/truncated_share"].tolist() == truncated
    # Means over tokens of the policy that samples: KL(old || trained) by current / old, KL(engine || old) by r.
    for name, ratios in {"policy/approx_kl": ratio, "mismatch/k3": apart}.items():
        torch.testing.assert_close(found.means[name].float(), column(x - 1 - math.log(x) for x in ratios))
    torch.testing.assert_close(found.means["policy/mean_probability"], column(0.1 * x for x in ratio))
    torch.testing.assert_close(found.maxima["mismatch/abs_max"].float(), column(abs(math.log(x)) for x in apart))
