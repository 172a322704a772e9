"""After a push: do trainer and engine give the same log-probs? Tokens that the engine samples answer.

    every engine   samples the same fixed prompts, as a rollout would: through its prefix cache    trainer rank 0
    all ranks      score these sequences with the trainer's weights
    rank 0         compares the sampled tokens' log-probs

Scoring given tokens would go around the prefix cache: keys and values that an earlier policy left there, which every
rollout would attend to, are seen only by sampling prompts that have been sampled before. `prime` samples them once
before the first push.
"""

import dataclasses

import msgspec
import numpy as np
import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import all_agree, on_first_rank, sum_over_ranks
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.seeds import sampling_seed
from dapo_megatron.engines.wire import Completion, SamplingParams
from dapo_megatron.errors import EngineError
from dapo_megatron.resharding.push import Pusher


class Verifier:
    """Compares trainer and engines; every rank holds one."""

    def __init__(self, config: RunConfig, actor: Actor, pusher: Pusher, prompts: list[list[int]]):
        self.actor, self.pusher, self.prompts = actor, pusher, prompts
        self.tolerance = config.resharding.verify_tolerance
        length = min(config.resharding.verify_tokens, config.rollout.max_response_tokens)
        self.params = SamplingParams(max_new_tokens=length, temperature=config.rollout.temperature)
        if config.engine.deterministic:
            self.params = msgspec.structs.replace(self.params, sampling_seed=sampling_seed(config.seed, "verification"))

    def prime(self) -> None:
        """Sample the prompts once, under whatever the engines serve; collective over all ranks.

        They go on first: a trainer that was here before may have been ended in the midst of a push.
        """
        with all_agree("sampling the prompts of the verification", self.actor.layout):
            if self.actor.layout.rank == 0:
                self.pusher.on_all(EngineControl.resume)
                self.pusher.on_all(lambda engine: engine.fill_cache(self.prompts, self.params))

    def verify(self, version: int) -> float:
        """Largest |log-prob difference| over the sampled tokens; collective over all ranks.

        Args:
            version: what the engines must be serving.

        Raises:
            EngineError: another version, or a difference above the tolerance; names engine, prompt and token.
        """
        layout = self.actor.layout
        sampled = on_first_rank("sampling from the engines", layout, lambda: self._sample(version))
        ours = self._trainers_logprobs([prompt + c.token_ids for _, prompt, c in sampled])
        worst, where = self._compare(sampled, ours)
        if not worst <= self.tolerance:
            raise EngineError(
                f"trainer and engine disagree after the push: |log-prob difference| {worst:.2e} at {where} exceeds "
                f"resharding.verify_tolerance={self.tolerance:.1e}"
            )
        return worst

    def _sample(self, version: int) -> list[tuple[str, list[int], Completion]]:
        """(URL, prompt, completion) of every engine and prompt."""
        found = []
        sampled = self.pusher.on_all(lambda engine: engine.sample(self.prompts, self.params))
        for engine, completions in zip(self.pusher.engines, sampled, strict=True):
            for prompt, completion in zip(self.prompts, completions, strict=True):
                if others := {span.version for span in completion.version_spans} - {version}:
                    raise EngineError(
                        f"engine {engine.url} sampled with version {min(others)} after version {version} was pushed: "
                        "somebody else has changed its weights"
                    )
                found.append((engine.url, prompt, completion))
        return found

    def _trainers_logprobs(self, sequences: list[list[int]]) -> np.ndarray:
        """[sequences, longest] float64: log-prob of the token after each position; 0 beyond a sequence's end."""
        actor = self.actor
        # Every data-parallel rank scores all of them: with experts spread over the ranks, all must take part.
        rules = dataclasses.replace(packing_rules(actor.config), data_parallel_size=1)
        (shard,) = shard_samples([scored_sample(i, s) for i, s in enumerate(sequences)], rules)
        found = actor.logprobs(shard)
        # The log-probs are on the last stage, a part on each rank: sum them.
        table = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.float64)
        if actor.layout.dp_rank == 0:
            for micro_batch, values in zip(shard, found, strict=False):
                positions = actor.own(micro_batch)
                starts = micro_batch.cu_seqlens[:-1]
                owners = np.searchsorted(starts, positions, side="right") - 1
                for position, owner, value in zip(positions, owners, values.tolist(), strict=True):
                    table[micro_batch.sequences[owner][1], position - starts[owner]] = value
        sum_over_ranks("collecting log-probs", table, actor.layout)
        return table.numpy()

    def _compare(self, sampled: list[tuple[str, list[int], Completion]], ours: np.ndarray) -> tuple[float, str]:
        """(largest difference, where it is); the same on every rank."""
        worst, where = 0.0, "no token"
        for (url, prompt, completion), row in zip(sampled, ours, strict=True):
            first = len(prompt) - 1
            difference = np.abs(row[first : first + len(completion.logprobs)] - np.array(completion.logprobs))
            token = int(difference.argmax())
            # `not <=` so that a NaN is the worst of all.
            if not difference[token] <= worst:
                worst, where = float(difference[token]), f"{url}, prompt {prompt[:8]}..., sampled token {token}"
        return worst, where


def scored_sample(index: int, token_ids: list[int]) -> TrainingSample:
    """A sequence whose every token but the first is scored."""
    n = len(token_ids) - 1
    return TrainingSample(token_ids, 1, [True] * n, [0.0] * n, 0.0, weight=0.0, source=(f"verify {index}", index))
