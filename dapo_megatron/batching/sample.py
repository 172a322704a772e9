"""One sequence to train on, before it is packed; and the way from a scored group to its sequences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.algorithm.objective import Aggregation, token_weights
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Prompt, Response, ScoredGroup


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """Prompt and response as one sequence; what belongs to response tokens has one entry for each of them."""

    token_ids: Sequence[int] | np.ndarray
    """Prompt, then response."""
    prompt_length: int
    """Tokens of the prompt, at least 1: the first one is predicted by nothing."""
    loss_mask: Sequence[bool] | np.ndarray
    """Which response tokens are trained."""
    logprobs: Sequence[float] | np.ndarray
    """Log-probability (natural log) with which each response token was sampled."""
    advantage: float
    weight: float
    """Weight of each trained token's loss."""
    source: tuple[str, int]
    """(prompt id, sample index), for messages."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.token_ids)


def weighted_samples(groups: Sequence[ScoredGroup], aggregation: Aggregation) -> list[TrainingSample]:
    """The sequences of one mini-batch, each with the weight of its trained tokens."""
    active = [[int(np.count_nonzero(response.loss_mask)) for response in group.responses] for group in groups]
    weights = token_weights(active, aggregation)
    return [
        training_sample(group.prompt, response, weight)
        for group, group_weights in zip(groups, weights, strict=True)
        for response, weight in zip(group.responses, group_weights, strict=True)
    ]


def training_sample(prompt: Prompt, response: Response, weight: float) -> TrainingSample:
    """A response with its prompt as one sequence."""
    return TrainingSample(
        token_ids=np.concatenate([np.array(prompt.input_ids, np.int32), response.token_ids]),
        prompt_length=len(prompt.input_ids),
        loss_mask=response.loss_mask,
        logprobs=response.rollout_logprobs,
        advantage=response.advantage,
        weight=weight,
        source=(prompt.id, response.sample),
    )


def check_response(prompt: Prompt, response: Response) -> None:
    """Raise DapoError unless they can be trained on."""
    where = f"prompt '{prompt.id}', response {response.sample}"
    if not prompt.input_ids:
        raise DapoError(f"{where}: the prompt has no tokens, so nothing predicts the response's first one")
    for name in ("loss_mask", "rollout_logprobs"):
        entries, tokens = len(getattr(response, name)), len(response.token_ids)
        if entries != tokens:
            raise DapoError(f"{where}: {name} has {entries} entries for {tokens} tokens; rollout.function must agree")
    if not math.isfinite(response.advantage):
        raise DapoError(f"{where}: its advantage is {response.advantage}; are all rewards of the group finite?")
