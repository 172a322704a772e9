"""Dynamic sampling: generate until a rollout step's groups are full (DAPO, arXiv 2503.14476, section 3.2).

    buffer.issue -> make_group (engines, graders, scoring) -> buffer.graded -> ... -> buffer.end_step

A round waits for all its groups: the slowest answer unblocks it. Rounds are sized to the deficit by the share of groups
kept so far. Kept groups that the step does not need are carried and consumed first in the next one.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import DataError
from dapo_megatron.records import Prompt, ScoredGroup
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.concurrency import all_or_first_error
from dapo_megatron.rollout.ledger import Ledger
from dapo_megatron.rollout.metrics import group_metrics
from dapo_megatron.rollout.selection import fate_of, round_size

MakeGroup = Callable[[Prompt, int], Coroutine[Any, Any, ScoredGroup]]
Progress = Callable[[str], None]


class StepGroups(msgspec.Struct):
    """The groups of one step in issue order, what was seen on the way, and the state after it."""

    groups: list[ScoredGroup]
    seen: list[ScoredGroup]
    metrics: dict[str, float]
    state: bytes
    """Snapshot of the buffer, for the checkpoint of this step."""


class Producer:
    """Fills one rollout step after another."""

    def __init__(
        self,
        config: RunConfig,
        buffer: GroupBuffer,
        make_group: MakeGroup,
        ledger: Ledger,
        trouble: Callable[[], str | None] = lambda: None,
    ):
        """
        Args:
            make_group: `make_group(prompt, order)` generates, grades and scores one group.
            trouble: says why responses are without a verdict, if there are any.
        """
        self.config, self.buffer, self.make_group, self.ledger = config, buffer, make_group, ledger
        self._trouble = trouble

    async def produce(self, step: int, version: int, progress: Progress) -> StepGroups:
        """Generate until the step is full.

        Args:
            version: the policy version that is live when the step begins.

        Raises:
            DataError: max_generation_rounds passed and the step is not full; says what was seen.
        """
        wanted, buffer = self.config.rollout.prompts_per_step, self.buffer
        buffer.begin_step(version - self.config.rollout.max_policy_lag - 1)
        carried_in, rounds = len(buffer.kept), 0
        seen: list[ScoredGroup] = []
        while (deficit := wanted - len(buffer.kept)) > 0:
            if rounds == self.config.algorithm.max_generation_rounds:
                raise DataError(self._hopeless(seen))
            rounds += 1
            groups = await self._round(deficit, f"{len(buffer.kept)}/{wanted} kept, ", progress)
            seen += groups
            buffer.graded([(g, fate_of(g, self.config)) for g in groups])
        used, entries = buffer.end_step(wanted, step)
        fresh_kept = sum(fate_of(g, self.config) == "kept" for g in seen)
        metrics = group_metrics(self.ledger.settle(entries), carried_in, rounds, fresh_kept, len(seen))
        return StepGroups(used, seen, metrics, await asyncio.to_thread(buffer.snapshot))

    async def _round(self, deficit: int, so_far: str, progress: Progress) -> list[ScoredGroup]:
        dynamic = self.config.algorithm.dynamic_sampling
        count = round_size(deficit, self.buffer.state.kept_share) if dynamic else deficit
        issued = [self.buffer.issue() for _ in range(count)]
        return await all_or_first_error(
            (self.make_group(prompt, order) for order, prompt in issued),
            lambda done: progress(f"{so_far}{done}/{count} groups generated"),
        )

    def _hopeless(self, seen: list[ScoredGroup]) -> str:
        fates = [fate_of(g, self.config) for g in seen]
        verdicts = [r.verdict for g in seen for r in g.responses]
        missing = verdicts.count("unknown")
        message = (
            f"after {self.config.algorithm.max_generation_rounds} rounds of generation only {len(self.buffer.kept)} of "
            f"{self.config.rollout.prompts_per_step} groups are mixed: of {len(seen)} groups "
            f"{fates.count('all_right')} were all right and {fates.count('all_wrong')} all wrong"
        )
        if missing:
            message += (
                f"; {missing} of {len(verdicts)} responses have no verdict ({self._trouble() or 'no reason known'})"
            )
            if missing == len(verdicts):
                return f"{message}: mend grading.grader"
        return message + (
            "; use easier or harder prompts, a larger rollout.group_size or algorithm.max_generation_rounds, or "
            "algorithm.dynamic_sampling=false"
        )
