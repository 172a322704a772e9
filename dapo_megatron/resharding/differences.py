"""Log-prob differences of trainer and engine after a push, and what they may be."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dapo_megatron.engines.wire import Completion


@dataclass(frozen=True)
class Differences:
    """|Log-prob differences| over the tokens that one engine sampled, or what they may be."""

    mean: float = math.inf
    p99: float = math.inf
    max: float = math.inf

    def exceeds(self, limits: "Differences", slack: float) -> bool:
        """Whether one of them is too large; NaN is."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(limits), strict=True)
        return not all(value <= limit * slack for value, limit in pairs)


LIMITS = {"float32": Differences(max=1e-4), "bfloat16": Differences(mean=0.1, p99=0.5)}
"""By the coarser of the two types. Of bfloat16 twice what rounding alone did to SmolLM2-135M in the worst of 20 pushes
(mean 0.049, 99th percentile 0.24); the maximum, from 0.2 to 0.7, says nothing."""


def differences(sampled: list[tuple[str, list[int], Completion]], ours: np.ndarray) -> Iterator[np.ndarray]:
    """[tokens] of each completion: |log-prob difference| of its tokens.

    Args:
        ours: [completions, longest] log-prob of the token after each position.
    """
    for (_, prompt, completion), row in zip(sampled, ours, strict=True):
        first = len(prompt) - 1
        yield np.abs(row[first : first + len(completion.logprobs)] - np.array(completion.logprobs))


def summary(tokens: np.ndarray) -> Differences:
    """Of [tokens] |log-prob differences|."""
    return Differences(float(tokens.mean()), float(np.quantile(tokens, 0.99)), float(tokens.max()))


def described(found: Differences, limits: Differences, slack: float) -> str:
    """Each of them, with what it may be."""
    fields = [(f.name, getattr(found, f.name), getattr(limits, f.name)) for f in dataclasses.fields(found)]
    return ", ".join(
        f"{name} {value:.2e}" + (f" (at most {limit * slack:.2e})" if limit < math.inf else "")
        for name, value, limit in fields
    )
