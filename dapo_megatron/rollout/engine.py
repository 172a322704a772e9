"""What a rollout function sees of the engines: sampling for one sample of one group, and the tokenizer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from dapo_megatron.engines.wire import Sampled, SamplingParams
from dapo_megatron.rollout.call_deadline import CallDeadline, Request

TokenIds = Sequence[int] | np.ndarray


class Sampler(Protocol):
    """Whatever samples one response (engines.coalescing, engines.client)."""

    @property
    def asked_again(self) -> int:
        """Requests that were asked again, because an engine gave no answer."""
        ...

    async def generate(self, input_ids: list[int], params: SamplingParams) -> Sampled:
        """Sample one response."""
        ...


class Engine:
    """Handle of one sample of one group."""

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        sample: int,
        seed: Callable[[int], int] | None = None,
    ):
        """`seed` gives each request's own, by its number from 0 (turns, and calls that are made again); None: none."""
        self.tokenizer = tokenizer
        self.params = params
        self.sample = sample
        """Index within the group, from 0."""
        self.deadline: CallDeadline | None = None
        """Of the function's call that goes on."""
        self._sampler, self._seed, self._requests = sampler, seed, 0

    async def generate(self, input_ids: TokenIds, max_new_tokens: int | None = None) -> Sampled:
        """Sample a continuation of input_ids; max_new_tokens lowers the run's limit (for further turns).

        What comes back are arrays: join them by numpy.concatenate, `+` would add number to number. The wait for a slot
        does not count for rollout.function_timeout_s.
        """
        limit = self.params.max_new_tokens if max_new_tokens is None else max_new_tokens
        params = msgspec.structs.replace(self.params, max_new_tokens=limit)
        if self._seed is not None:
            params = msgspec.structs.replace(params, sampling_seed=self._seed(self._requests))
            self._requests += 1
        with self.deadline.request() if self.deadline else nullcontext(Request()) as request:
            sampled = await self._sampler.generate(_as_list(input_ids), params)
            request.waited_s = sampled.waited_s
        return sampled

    def decode(self, token_ids: TokenIds) -> str:
        """Text of a response without its special tokens."""
        text: str = self.tokenizer.decode(_as_list(token_ids), skip_special_tokens=True)
        return text


def _as_list(token_ids: TokenIds) -> list[int]:
    found: list[int] = np.asarray(token_ids).tolist()
    return found
