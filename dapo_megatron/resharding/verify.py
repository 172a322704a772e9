"""After a push: do the engines hold the trainer's weights, and do both give the same log-probs?

    every engine   samples the same fixed prompts, as a rollout would: through its prefix cache    trainer rank 0
    every engine   takes checksums of its weights, every stage's sender of what they should be (resharding.checksums)
    all ranks      score these sequences with the trainer's weights
    rank 0         compares the sampled tokens' log-probs

Scoring given tokens would go around the prefix cache: keys and values that an earlier policy left there, which every
rollout would attend to, are seen only by sampling prompts that have been sampled before. `prime` samples them once
before the first push.
"""

import dataclasses
import uuid

import msgspec
import numpy as np
import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.model import DTYPES
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import all_agree, on_first_rank, sum_over_ranks
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.seeds import sampling_seed
from dapo_megatron.engines.wire import Completion, SamplingParams
from dapo_megatron.errors import EngineError
from dapo_megatron.observe import catalog as m
from dapo_megatron.resharding.checksums import differing, expected_checksums, find_checksum
from dapo_megatron.resharding.differences import LIMITS, Differences, described, differences, summary
from dapo_megatron.resharding.plan import GATHER_BYTES
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.weights.exporter import export_stage
from dapo_megatron.weights.table import some_names

SENT = "every parameter but experts is there bit for bit"


class Verifier:
    """Compares trainer and engines; every rank holds one."""

    def __init__(self, config: RunConfig, actor: Actor, pusher: Pusher, prompts: list[list[int]]):
        self.config, self.actor, self.pusher, self.prompts = config, actor, pusher, prompts
        self._name = f"verification {uuid.uuid4().hex}"
        """Engines outlive a trainer, and may hold keys and values of another version of the same number."""
        self.limits, self.slack = LIMITS[config.coarser_dtype], config.resharding.verify_slack
        self.params = SamplingParams(config.verify_tokens, config.rollout.temperature, ignore_eos=True)
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

    def verify(self, version: int) -> dict[str, float]:
        """Compare weights and log-probs; collective over all ranks.

        Args:
            version: what the engines must be serving.

        Returns:
            sync/checksums, and sync/logprob_difference with its mean and 99th percentile.

        Raises:
            EngineError: another version, parameters that differ, or differences above what the type allows; names the
                engine, and the parameters, or prompt and token.
        """
        layout = self.actor.layout
        sampled = on_first_rank("sampling from the engines", layout, lambda: self._sample(version))
        compared = self._compare_weights() if self.config.resharding.verify_checksums else 0.0
        ours = self._trainers_logprobs([prompt + c.token_ids for _, prompt, c in sampled])
        worst = self._compare_logprobs(sampled, ours, SENT if compared else "no parameter was compared")
        return {
            m.SYNC_CHECKSUMS: compared,
            m.SYNC_DIFFERENCE: worst.max,
            m.SYNC_DIFFERENCE_MEAN: worst.mean,
            m.SYNC_DIFFERENCE_P99: worst.p99,
        }

    def _compare_weights(self) -> float:
        """Parameters of each engine that are as the trainer has them, of those that have a checksum."""
        layout, pusher = self.actor.layout, self.pusher
        held = on_first_rank("taking the engines' checksums", layout, self._held_checksums)
        if not held:
            return 0.0
        compared = torch.zeros(1, dtype=torch.float64)
        with all_agree("comparing the engines' weights", layout):
            expected = self._expected_checksums(len(held[0]))
            for engine, sums in zip(pusher.engines, held, strict=True) if pusher.is_sender else ():
                count, others = differing(expected, sums)
                if others:
                    raise EngineError(
                        f"engine {engine.url} holds other weights than the trainer in {len(others)} of {count} "
                        f"parameters: {some_names(others, order=False)} (if it packs or quantises what it is sent: "
                        "resharding.verify_checksums=false)"
                    )
                compared[0] = count
        sum_over_ranks("counting checksums", compared, layout)
        return float(compared)

    def _held_checksums(self) -> list[list[dict[str, str]]]:
        """[engine][its rank]; empty where there is nothing to compare."""
        if find_checksum(self.actor.device) is None:
            return []
        held = self.pusher.on_all(EngineControl.checksums)
        return held if any(rank for engine in held for rank in engine) else []

    def _expected_checksums(self, tp_size: int) -> dict[str, list[str]]:
        """Of this rank's stage, on its sender; collective over the stage's ranks."""
        modules, shape = self.actor.modules, self.actor.shape
        tensors = export_stage(modules, shape, GATHER_BYTES)
        checksum = find_checksum(self.actor.device)
        if checksum is None or not self.pusher.is_sender:
            for _ in tensors:
                pass
            return {}
        return expected_checksums(tensors, shape, tp_size, DTYPES[self.pusher.dtype], checksum)

    def _sample(self, version: int) -> list[tuple[str, list[int], Completion]]:
        """(URL, prompt, completion) of every engine and prompt."""
        found = []
        # Where the cache is kept, what it holds of these prompts is the earlier versions'.
        key = f"{self._name} of {version}" if self.config.keeps_kv else None
        sampled = self.pusher.on_all(lambda engine: engine.sample(self.prompts, self.params, key))
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

    def _compare_logprobs(
        self, sampled: list[tuple[str, list[int], Completion]], ours: np.ndarray, weights: str
    ) -> Differences:
        """Those of the worst engine; the same on every rank."""
        found: dict[str, list[np.ndarray]] = {}
        for (url, _, _), difference in zip(sampled, differences(sampled, ours), strict=True):
            found.setdefault(url, []).append(difference)
        worst = Differences(0.0, 0.0, 0.0)
        for url, tokens in found.items():
            of_engine = summary(np.concatenate(tokens))
            if of_engine.exceeds(self.limits, self.slack):
                at = max(range(len(tokens)), key=lambda i: np.nan_to_num(tokens[i], nan=np.inf).max())
                raise EngineError(
                    f"trainer and engine {url} disagree after the push: |log-prob difference| of "
                    f"{sum(map(len, tokens))} tokens, {described(of_engine, self.limits, self.slack)}, the largest "
                    f"after prompt {self.prompts[at][:8]}...; {weights}; resharding.verify_slack={self.slack:g}"
                )
            worst = Differences(*map(max, dataclasses.astuple(worst), dataclasses.astuple(of_engine)))
        return worst


def scored_sample(index: int, token_ids: list[int]) -> TrainingSample:
    """A sequence whose every token but the first is scored."""
    n = len(token_ids) - 1
    return TrainingSample(token_ids, 1, [True] * n, [0.0] * n, 0.0, weight=0.0, source=(f"verify {index}", index))
