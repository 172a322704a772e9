"""Every group that was issued, by its state, and the snapshot that a checkpoint keeps.

    ISSUED    the prompt is with the engines           -> KEPT, or FILTERED (all right, all wrong), when it is graded;
                                                          UNFINISHED by the engines, and at once ISSUED again
    KEPT      mixed, and not yet in a batch            -> trained in the next batch, or CARRIED over it
    CARRIED   mixed, and left by a batch that was full -> trained in the next batch, CARRIED over it, or STALE before it
    STALE     too old: its prompt waits                -> ISSUED, under its old number

Every transition out of KEPT and CARRIED, a filtered or an unfinished group, and one that is with the engines while a
batch leaves, is a line of the ledger, which belongs to that batch. The snapshot goes with a batch; of what is with the
engines then it keeps number and prompt, to be issued again.
"""

from collections.abc import Sequence

import msgspec

from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.data.snapshot import Snapshot, data_digest, decode_snapshot
from dapo_megatron.errors import ConfigError
from dapo_megatron.records import Prompt, ScoredGroup
from dapo_megatron.rollout.ledger import Entry, Fate
from dapo_megatron.rollout.selection import Share, Verdicted, by_age, take


class GroupBuffer:
    """Holds the groups of one step after another."""

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, state: bytes | None = None, step: int = 0
    ):
        """`state` is the snapshot to go on from, which belongs to `step`.

        Raises:
            ConfigError: it is damaged, or a prompt of it is no longer in the data.
            DapoError: the number of prompts or the seed is another one.
        """
        self._prompts = prompts
        self._by_id = {p.id: p for p in prompts}
        self._sampler = PromptSampler(len(prompts), seed, shuffle)
        data = data_digest(prompts)
        self.share = Share()
        self.state = Snapshot(0, self._sampler.state(), 0, (self.share.kept, self.share.seen), [], [], data)
        if state is not None:
            self.state = decode_snapshot(state, step)
            self._sampler = PromptSampler.restore(self.state.sampler, len(prompts), seed)
            self.share = Share(*self.state.share)
            if self.state.data != data:
                raise ConfigError(
                    "cannot resume: data.train holds other prompts or answers than when the run began, or has them in "
                    "another order; use the same data, or start a new run"
                )
            for order, prompt_id in [(g.order, g.prompt.id) for g in self.state.carried] + self.state.again:
                if prompt_id not in self._by_id:
                    raise ConfigError(
                        f"cannot resume: prompt '{prompt_id}' (number {order}) of the checkpoint is not in data.train; "
                        "use the same data, or start a new run"
                    )
        self.issued: dict[int, Prompt] = {}
        """With the engines, by order number."""
        self.kept = self.state.carried
        """Mixed, and in no batch; at the beginning of a step, carried ones."""
        self._entries: list[Entry] = []
        self._told: set[int] = set()
        """With the engines when an earlier batch left."""

    def begin_step(self, oldest_version: int) -> None:
        """Kept groups with a token older than `oldest_version` go to be issued again."""
        self.kept, stale = by_age(self.kept, oldest_version)
        self.state.again += [(g.order, g.prompt.id) for g in stale]
        self._end(stale, "stale")

    def issue(self) -> tuple[int, Prompt]:
        """(order number, prompt) of the next group."""
        if self.state.again:
            order, prompt_id = self.state.again.pop(0)
            prompt = self._by_id[prompt_id]
        else:
            order, prompt = self.state.next_order, self._prompts[self._sampler.next()]
            self.state.next_order += 1
        self.issued[order] = prompt
        return order, prompt

    def graded(self, group: ScoredGroup, fate: Verdicted) -> None:
        """A group came back."""
        del self.issued[group.order]
        self._told.discard(group.order)
        self.share.count(kept=fate == "kept")
        if fate == "kept":
            self.kept.append(group)
        else:
            self._end([group], fate)

    def unfinished(self, order: int) -> None:
        """The engines did not finish a group: it is issued again, under its number."""
        self._entries.append(Entry(0, order, self.issued[order].id, "unfinished", -1))

    def end_step(self, wanted: int, step: int, oldest_version: int) -> tuple[list[ScoredGroup], list[Entry]]:
        """(the step's groups in issue order, the ledger's entries); the rest is carried.

        Args:
            oldest_version: that the next step may still train.
        """
        used, self.kept = take(self.kept, wanted, oldest_version)
        self._end(used, "kept")
        self._end(self.kept, "carried")
        for order in self.issued.keys() - self._told:
            self._entries.append(Entry(0, order, self.issued[order].id, "issued", -1))
        self._told = set(self.issued)
        self.share.age()
        self.state.step = step
        entries, self._entries = self._entries, []
        return used, [msgspec.structs.replace(e, step=step) for e in entries]

    def snapshot(self) -> Snapshot:
        """The state, for a checkpoint; what happens later does not change it."""
        with_engines = [(order, prompt.id) for order, prompt in self.issued.items()]
        return msgspec.structs.replace(
            self.state,
            sampler=self._sampler.state(),
            share=(self.share.kept, self.share.seen),
            carried=list(self.kept),
            again=self.state.again + with_engines,
        )

    def _end(self, groups: Sequence[ScoredGroup], fate: Fate) -> None:
        self._entries += [Entry(0, g.order, g.prompt.id, fate, g.oldest_version) for g in groups]
