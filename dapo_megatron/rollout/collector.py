"""Dynamic sampling: generate until a rollout step's groups are full (DAPO, arXiv 2503.14476, section 3.2).

Rounds are sized to the deficit by the share of groups kept so far. All groups of a round are waited for, and among
finished groups the earliest issued are taken: taking whoever finishes first would favour short answers. Kept groups
that the step does not need are carried and consumed first in the next one.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from dapo_megatron.algorithm.dynamic_sampling import group_outcome
from dapo_megatron.config import RunConfig
from dapo_megatron.data.sampler import PromptSampler, SamplerState
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Group, Prompt
from dapo_megatron.rollout.ledger import Entry, Ledger

MakeGroup = Callable[[Prompt, int], Awaitable[Group]]
Progress = Callable[[str], None]

KEPT_SHARE_MEMORY = 0.7
"""Weight of the past in the running share of groups kept; a step or two old is still a fair forecast."""
MAX_OVERSAMPLE = 4.0
"""Most groups issued for one missing group in a round, however hard the data look."""


class CollectorState(msgspec.Struct):
    """What a checkpoint needs to go on: the data cursor, the next order number and the groups carried over."""

    sampler: SamplerState
    next_order: int
    kept_share: float
    carried: list[Group]
    again: list[tuple[int, str]]
    """(order, prompt id) of groups that became stale and must be issued again."""


class Collected(msgspec.Struct):
    """The groups of one step in issue order, what was seen on the way, and the state after it."""

    groups: list[Group]
    seen: list[Group]
    metrics: dict[str, float]
    state: bytes


class Collector:
    """Fills one rollout step after another."""

    def __init__(
        self,
        config: RunConfig,
        prompts: list[Prompt],
        make_group: MakeGroup,
        ledger: Ledger,
        state: bytes | None = None,
    ):
        """`make_group(prompt, order)` generates and grades one group; `state` is a Collected.state to go on from."""
        self.config, self.prompts, self.make_group, self.ledger = config, prompts, make_group, ledger
        self._by_id = {p.id: p for p in prompts}
        self.sampler = PromptSampler(len(prompts), config.seed, config.data.shuffle)
        self.state = CollectorState(self.sampler.state(), 0, 1.0, [], [])
        if state is not None:
            self.state = msgspec.msgpack.decode(state, type=CollectorState)
            self.sampler = PromptSampler.restore(self.state.sampler, len(prompts), config.seed)

    async def collect(self, step: int, version: int, progress: Progress) -> Collected:
        """Generate until the step is full.

        Args:
            version: the policy version that is live when the step begins.

        Raises:
            DapoError: max_generation_rounds passed and the step is not full; says what was seen.
        """
        wanted, settled, seen = self.config.rollout.prompts_per_step, [], []
        kept, stale = self._carried(version)
        settled += [self._entry(step, g, "stale") for g in stale]
        carried_in, rounds = len(kept), 0
        while len(kept) < wanted:
            if rounds == self.config.algorithm.max_generation_rounds:
                raise DapoError(self._hopeless(seen, len(kept)))
            rounds += 1
            so_far = f"{len(kept)}/{wanted} kept, "
            groups = await self._round(wanted - len(kept), partial(_prefixed, progress, so_far))
            seen += groups
            fresh = [g for g in groups if self._fate(g) == "kept"]
            self._remember(len(fresh) / len(groups))
            kept += fresh
            settled += [self._entry(step, g, self._fate(g)) for g in groups if self._fate(g) != "kept"]
        kept.sort(key=lambda g: g.order)
        used, self.state.carried = kept[:wanted], kept[wanted:]
        settled += [self._entry(step, g, "kept") for g in used]
        settled += [self._entry(step, g, "carried") for g in self.state.carried]
        self.state.sampler = self.sampler.state()
        metrics = self._metrics(settled, seen, carried_in, rounds)
        return Collected(used, seen, metrics, msgspec.msgpack.encode(self.state))

    def _carried(self, version: int) -> tuple[list[Group], list[Group]]:
        """Split the carried groups into those still fresh enough and those to issue again."""
        oldest = version - self.config.rollout.max_policy_lag - 1
        kept = [g for g in self.state.carried if g.oldest_version >= oldest]
        stale = [g for g in self.state.carried if g.oldest_version < oldest]
        self.state.carried = []
        self.state.again += [(g.order, g.prompt.id) for g in stale]
        return kept, stale

    async def _round(self, deficit: int, progress: Progress) -> list[Group]:
        count = deficit
        if self.config.algorithm.dynamic_sampling:
            count = math.ceil(deficit * min(MAX_OVERSAMPLE, 1 / max(self.state.kept_share, 1e-6)))
        issued = [self._next_prompt() for _ in range(count)]
        tasks = [asyncio.ensure_future(self.make_group(prompt, order)) for order, prompt in issued]
        try:
            for done, finished in enumerate(asyncio.as_completed(tasks), start=1):
                await finished
                progress(f"{done}/{count} groups generated")
        finally:
            for task in tasks:
                task.cancel()
        return [task.result() for task in tasks]

    def _next_prompt(self) -> tuple[int, Prompt]:
        if self.state.again:
            order, prompt_id = self.state.again.pop(0)
            prompt = self._by_id[prompt_id]
        else:
            order, prompt = self.state.next_order, self.prompts[self.sampler.next()]
            self.state.next_order += 1
        self.ledger.issue(order, prompt.id)
        return order, prompt

    def _fate(self, group: Group) -> str:
        if not self.config.algorithm.dynamic_sampling:
            return "kept"
        mask_unknown = self.config.grading.unknown == "mask"
        verdicts = [r.verdict for r in group.responses if not (mask_unknown and r.verdict == "unknown")]
        outcome = group_outcome(verdicts) if verdicts else "all_wrong"
        return "kept" if outcome == "mixed" else outcome

    def _remember(self, share: float) -> None:
        self.state.kept_share = KEPT_SHARE_MEMORY * self.state.kept_share + (1 - KEPT_SHARE_MEMORY) * share

    def _entry(self, step: int, group: Group, fate) -> Entry:
        return Entry(step, group.order, group.prompt.id, fate, group.oldest_version)

    def _metrics(self, settled: list[Entry], seen: list[Group], carried_in: int, rounds: int) -> dict[str, float]:
        fates = self.ledger.settle(settled)
        fresh_kept = sum(self._fate(g) == "kept" for g in seen)
        return {
            "groups/kept": float(fates["kept"]),
            "groups/all_right": float(fates["all_right"]),
            "groups/all_wrong": float(fates["all_wrong"]),
            "groups/stale": float(fates["stale"]),
            "groups/carried_in": float(carried_in),
            "groups/surplus": float(fates["carried"]),
            "groups/kept_share": fresh_kept / len(seen) if seen else 1.0,
            "rollout/generation_rounds": float(rounds),
        }

    def _hopeless(self, seen: list[Group], kept: int) -> str:
        outcomes = [self._fate(g) for g in seen]
        return (
            f"after {self.config.algorithm.max_generation_rounds} rounds of generation only {kept} of "
            f"{self.config.rollout.prompts_per_step} groups are mixed: of {len(seen)} groups "
            f"{outcomes.count('all_right')} were all right and {outcomes.count('all_wrong')} all wrong; use "
            "easier or harder prompts, a larger rollout.group_size or algorithm.max_generation_rounds, or "
            "algorithm.dynamic_sampling=false"
        )


def _prefixed(progress: Progress, prefix: str, text: str) -> None:
    progress(prefix + text)
