"""Fills one rollout step after another with groups (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).

    issue -> make_group (engines, graders, scoring) -> graded -> kept or filtered -> ... -> a batch takes what it needs

max_policy_lag 0    a step issues what it is expected to need and a margin, more whenever too many are filtered, waits
                    for all of them, and takes the earliest issued. The surplus is carried into the next step.
max_policy_lag N    groups are issued all the time, as many as the next N batches are expected to need (N + 1 while the
                    trainer waits), a few more than the engines have room for. A batch is taken as soon as enough mixed
                    groups are finished, but waits for every group that would be older than N in the next one.

`step` waits for groups, and is woken by every one that is finished; a group waits for engines and graders alone. No
group is dropped: each is trained, filtered or issued again, as is one that the engines did not finish
(rollout.max_reissues).
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from dapo_megatron.config import RunConfig
from dapo_megatron.data.snapshot import encode_snapshot
from dapo_megatron.errors import DataError
from dapo_megatron.records import Prompt, ScoredGroup
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.ledger import Ledger
from dapo_megatron.rollout.metrics import group_metrics
from dapo_megatron.rollout.reissue import until_finished
from dapo_megatron.rollout.selection import fate_of, groups_to_issue

MakeGroup = Callable[[Prompt, int], Coroutine[Any, Any, ScoredGroup]]
Progress = Callable[[str], None]
QUEUED = 1.25
"""Groups with the engines, in units of what they have room for: the first answers of a group end before its last."""


class StepGroups(msgspec.Struct):
    """The groups of one step in issue order, what was seen on the way, and the state after it."""

    groups: list[ScoredGroup]
    seen: list[ScoredGroup]
    metrics: dict[str, float]
    state: bytes
    """Snapshot of the buffer, for the checkpoint of this step."""


@dataclass
class _Flight:
    """A group that is with the engines."""

    task: asyncio.Task[None]
    version: int
    """That was live when it was issued last; of one that is finished already, the oldest that it may be of."""
    round: int
    """0 if an earlier batch left it; else that of its issue (`Producer._next_round`)."""
    group: ScoredGroup | None = None
    """Finished, and not yet graded."""
    is_first: bool = False
    """Whether it was there when `step` began."""


class Producer:
    """Keeps the engines busy and hands out the groups of each step; the caller closes it."""

    def __init__(
        self,
        config: RunConfig,
        buffer: GroupBuffer,
        make_group: MakeGroup,
        ledger: Ledger,
        trouble: Callable[[], str | None] = lambda: None,
        is_finished: Callable[[int], bool] = lambda order: False,
    ):
        """
        Args:
            make_group: `make_group(prompt, order)` generates, grades and scores one group.
            trouble: says why responses are without a verdict, if there are any.
            is_finished: whether the group of an order number comes back at once, made by an earlier start of the run.
        """
        self.config, self.buffer, self.make_group, self.ledger = config, buffer, make_group, ledger
        self._trouble, self._is_finished = trouble, is_finished
        self._flights: dict[int, _Flight] = {}
        """By order number, in the order of their issue."""
        self._version = 0
        self._is_waiting = False
        """Whether the trainer waits for a batch."""
        self._seen: list[ScoredGroup] = []
        """Graded since the last batch."""
        self._first_s = 0.0
        """By the event loop: when the last of those groups was finished that were there when `step` began."""
        self._round = 0
        """The highest since the last batch."""
        self._issued = 0
        """Groups since the last batch."""
        self._changed = asyncio.Event()
        self._error: BaseException | None = None

    async def step(self, step: int, version: int, progress: Progress) -> StepGroups:
        """The groups of a step, as soon as it is full.

        Args:
            version: the policy version that is live, and will train them.

        Raises:
            DataError: max_generation_rounds passed and the step is not full; says what was seen.
        """
        wanted, buffer = self.config.rollout.prompts_per_step, self.buffer
        self._version, self._is_waiting = version, True
        buffer.begin_step(version - self._age)
        carried_in = len(buffer.kept)
        self._issue()
        clock = asyncio.get_running_loop().time
        began = self._first_s = clock()
        for flight in self._flights.values():
            flight.is_first = True
        while self._error is None and (len(buffer.kept) < wanted or self._must_wait()):
            if not self._flights:
                raise DataError(self._hopeless())
            progress(f"{len(buffer.kept)}/{wanted} kept, {len(self._flights)} groups with the engines")
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            await self.close()
            raise self._error
        self._is_waiting = False
        used, entries = buffer.end_step(wanted, step, version + 1 - self._age)
        rounds = max(1.0, (clock() - began) / (self._first_s - began)) if self._first_s > began else 1.0
        seen, self._seen = sorted(self._seen, key=lambda g: g.order), []
        for flight in self._flights.values():
            flight.round, flight.is_first = 0, False
        self._round = self._issued = 0
        fresh_kept = sum(fate_of(g, self.config) == "kept" for g in seen)
        metrics = group_metrics(self.ledger.settle(entries), carried_in, rounds, fresh_kept, len(seen))
        return StepGroups(used, seen, metrics, await asyncio.to_thread(encode_snapshot, buffer.snapshot()))

    def run_ahead(self) -> None:
        """With a lag, go on for the next steps while this one is trained."""
        if self.config.rollout.max_policy_lag:
            self._issue()

    async def close(self) -> None:
        """Generate no more."""
        tasks = [flight.task for flight in self._flights.values()]
        self._flights = {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # the first error is told by whoever waits

    @property
    def _age(self) -> int:
        """Versions that a group may be behind the one that trains it; without a lag, carried ones are one behind."""
        return max(1, self.config.rollout.max_policy_lag)

    def _must_wait(self) -> bool:
        """Whether this step waits for a group that is with the engines: one that would be too old for the next."""
        lag = self.config.rollout.max_policy_lag
        return any(flight.version + lag <= self._version for flight in self._flights.values())

    def _issue(self) -> None:
        """Issue what is missing."""
        rollout, buffer = self.config.rollout, self.buffer
        wanted, lag, in_flight = rollout.prompts_per_step, rollout.max_policy_lag, len(self._flights)
        share = buffer.share.value if self.config.algorithm.dynamic_sampling else 1.0
        round = self._next_round(share)
        if round > self.config.algorithm.max_generation_rounds:
            return
        if lag == 0:
            count = groups_to_issue(wanted - len(buffer.kept), in_flight, share, rollout.oversample_sigmas)
        else:
            batches = lag + self._is_waiting
            count = groups_to_issue(batches * wanted - len(buffer.kept), in_flight, share, 0.0)
            room = math.ceil(QUEUED * self.config.concurrency / rollout.group_size)
            count = min(count, max(0, room - in_flight))
        for _ in range(count):
            order, prompt = buffer.issue()
            task = asyncio.create_task(self._fly(order, prompt))
            version = self._version - lag if self._is_finished(order) else self._version
            self._flights[order] = _Flight(task, version, round)
            self._round = round
            self._issued += 1
            task.add_done_callback(self._landed)

    def _next_round(self, share: float) -> int:
        """Of what is issued now. Without a lag: one more than the lowest of those it is issued beside. With one, the
        room of the engines says how many are issued at once, so as many as a step is expected to need are a round."""
        if self.config.rollout.max_policy_lag:
            return 1 + self._issued // groups_to_issue(self.config.rollout.prompts_per_step, 0, share, 0.0)
        return 1 + min((flight.round for flight in self._flights.values()), default=self._round)

    async def _fly(self, order: int, prompt: Prompt) -> None:
        """One group, until it is graded and replaced if need be; what is exact goes by the order of the issue."""

        def again() -> None:
            self.buffer.unfinished(order)
            self._flights[order].version = self._version

        what, reissues = f"group {order} (prompt '{prompt.id}')", self.config.rollout.max_reissues
        group = await until_finished(partial(self.make_group, prompt, order), what, reissues, again)
        self._flights[order].group = group
        for other, flight in list(self._flights.items()):
            if flight.group is not None:
                self._graded(other, flight, flight.group)
            elif self.config.engine.deterministic:
                break

    def _landed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
        self._changed.set()

    def _graded(self, order: int, flight: _Flight, group: ScoredGroup) -> None:
        del self._flights[order]
        self.buffer.graded(group, fate_of(group, self.config))
        self._seen.append(group)
        if flight.is_first:
            self._first_s = asyncio.get_running_loop().time()
        self._issue()

    def _hopeless(self) -> str:
        fates = [fate_of(g, self.config) for g in self._seen]
        verdicts = [r.verdict for g in self._seen for r in g.responses]
        missing = verdicts.count("unknown")
        message = (
            f"after {self.config.algorithm.max_generation_rounds} rounds of generation only {len(self.buffer.kept)} of "
            f"{self.config.rollout.prompts_per_step} groups are mixed: of {len(self._seen)} groups "
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
