"""Every group that was issued, by its state, and the snapshot that a checkpoint keeps.

    ISSUED    the prompt is with the engines           -> KEPT, or FILTERED (all right, all wrong), when it is graded
    KEPT      mixed, and not yet in a batch            -> trained in this step, or CARRIED into the next one
    CARRIED   kept when its step was full already      -> KEPT in the next step, or STALE if it is too old then
    STALE     its prompt waits to be issued again      -> ISSUED, under its old number

A transition that ends an issue (trained, filtered, carried, stale) is a line of the ledger. The snapshot is taken
between steps, when nothing is with the engines that belongs to an earlier one.
"""

from collections.abc import Sequence

import msgspec

from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.data.snapshot import Snapshot, data_digest, decode_snapshot, encode_snapshot
from dapo_megatron.errors import ConfigError
from dapo_megatron.records import Prompt, ScoredGroup
from dapo_megatron.rollout.ledger import Entry, Fate
from dapo_megatron.rollout.selection import Verdicted, by_age, take, updated_share


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
        self.state = Snapshot(0, self._sampler.state(), 0, 1.0, [], [], data)
        if state is not None:
            self.state = decode_snapshot(state, step)
            self._sampler = PromptSampler.restore(self.state.sampler, len(prompts), seed)
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
        self.kept: list[ScoredGroup] = []
        self._entries: list[Entry] = []

    def begin_step(self, oldest_version: int) -> None:
        """Take up the carried groups; those with a token older than `oldest_version` go to be issued again."""
        self.kept, stale = by_age(self.state.carried, oldest_version)
        self.state.carried = []
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

    def graded(self, groups: Sequence[tuple[ScoredGroup, Verdicted]]) -> None:
        """A round came back, with the fate of each of its groups."""
        for group, fate in groups:
            del self.issued[group.order]
            if fate == "kept":
                self.kept.append(group)
            else:
                self._end([group], fate)
        share = sum(fate == "kept" for _, fate in groups) / len(groups)
        self.state.kept_share = updated_share(self.state.kept_share, share)

    def end_step(self, wanted: int, step: int) -> tuple[list[ScoredGroup], list[Entry]]:
        """(the step's groups in issue order, the ledger's entries); the rest is carried."""
        used, self.state.carried = take(self.kept, wanted)
        self.kept = []
        self._end(used, "kept")
        self._end(self.state.carried, "carried")
        self.state.sampler, self.state.step = self._sampler.state(), step
        entries, self._entries = self._entries, []
        return used, [msgspec.structs.replace(e, step=step) for e in entries]

    def snapshot(self) -> bytes:
        """The state, for a checkpoint."""
        return encode_snapshot(self.state)

    def _end(self, groups: Sequence[ScoredGroup], fate: Fate) -> None:
        self._entries += [Entry(0, g.order, g.prompt.id, fate, g.oldest_version) for g in groups]
