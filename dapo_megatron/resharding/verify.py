"""After a push: do trainer and engine give the same log-probs? A fixed prompt set answers."""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import on_first_rank
from dapo_megatron.errors import EngineError
from dapo_megatron.resharding.push import Pusher


class Verifier:
    """Compares trainer and engines; every rank holds one."""

    def __init__(self, config: RunConfig, actor: Actor, pusher: Pusher, prompts: list[list[int]]):
        self.actor, self.pusher, self.prompts = actor, pusher, prompts
        self.tolerance = config.resharding.verify_tolerance

    def verify(self) -> float:
        """Largest |log-prob difference| over the prompts' tokens; collective over all ranks.

        Raises:
            EngineError: it exceeds the tolerance; names the engine, the prompt and the token.
        """
        ours = self._trainers_logprobs()
        worst, where = on_first_rank("comparing log-probs", self.actor.layout, lambda: self._compare(ours))
        if not worst <= self.tolerance:
            raise EngineError(
                f"trainer and engine disagree after the push: |log-prob difference| {worst:.2e} at {where} exceeds "
                f"resharding.verify_tolerance={self.tolerance:.1e}"
            )
        return worst

    def _trainers_logprobs(self) -> torch.Tensor:
        """[prompts, longest prompt] float64: log-prob of the token after each position; 0 beyond a prompt's end."""
        actor, prompts = self.actor, self.prompts
        # Every data-parallel rank scores all prompts: with experts spread over them, all must take part.
        rules = dataclasses.replace(packing_rules(actor.config), data_parallel_size=1)
        (shard,) = shard_samples([scored_sample(i, p) for i, p in enumerate(prompts)], rules)
        found = actor.logprobs(shard, temperature=1.0)
        # The engines are asked by rank 0, the log-probs are on the last stage, a part on each rank: sum them.
        table = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.float64)
        if actor.layout.dp_rank == 0:
            for micro_batch, values in zip(shard, found, strict=False):
                positions = actor.own(micro_batch)
                starts = micro_batch.cu_seqlens[:-1]
                owners = np.searchsorted(starts, positions, side="right") - 1
                for position, owner, value in zip(positions, owners, values.tolist(), strict=True):
                    table[micro_batch.sequences[owner][1], position - starts[owner]] = value
        dist.all_reduce(table, group=actor.layout.control)
        return table

    def _compare(self, ours: torch.Tensor) -> tuple[float, str]:
        worst, where = 0.0, "no token"
        for engine in self.pusher.engines:
            for i, theirs in enumerate(engine.prompt_logprobs(self.prompts)):
                difference = (ours[i, : len(theirs)] - torch.tensor(theirs, dtype=torch.float64)).abs()
                token = int(difference.argmax())
                # `not <=` so that a NaN is the worst of all.
                if not float(difference[token]) <= worst:
                    worst, where = float(difference[token]), f"{engine.url}, prompt {i}, token {token + 1}"
        return worst, where


def scored_sample(index: int, token_ids: list[int]) -> TrainingSample:
    """A sequence whose every token but the first is scored."""
    n = len(token_ids) - 1
    return TrainingSample(token_ids, 1, [True] * n, [0.0] * n, 0.0, weight=0.0, source=(f"verify {index}", index))
