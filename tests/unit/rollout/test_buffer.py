"""Whatever the fates of groups, their age and the resumes of a run: every issued number is settled exactly once."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.data.snapshot import encode_snapshot
from dapo_megatron.errors import ConfigError
from dapo_megatron.records import Prompt, ScoredGroup, VersionSpan
from dapo_megatron.rollout.buffer import GroupBuffer
from tests.tiny import response

PROMPTS = [Prompt(id=f"p{i}", input_ids=[1], ground_truth="", text="", row=i) for i in range(5)]
SEED = 3
SETTLED = ("kept", "all_right", "all_wrong")
FATES = st.sampled_from(("kept", "kept", "kept", "all_right", "all_wrong"))
STEP = st.fixed_dictionaries(
    {
        "wanted": st.integers(1, 3),
        "newer": st.sampled_from((0, 1, 2, 2)),  # policy versions since the step before
        "rounds": st.lists(st.lists(FATES, min_size=1, max_size=6), max_size=3),
        "dies": st.one_of(st.none(), st.none(), st.integers(0, 12)),  # and goes on from one of the snapshots
    }
)


def group(order, prompt, version):
    return ScoredGroup(order, prompt, [response(prompt.id, 0, [1], version_spans=[VersionSpan(version, 0, 1)])])


class Run:
    """A run over a buffer; `history` holds (snapshot, version, ledger entries) of each step that survives."""

    def __init__(self):
        sampler = PromptSampler(len(PROMPTS), SEED)
        self.sequence = [PROMPTS[sampler.next()] for _ in range(1000)]
        self.history = []
        self.resume(0)

    def resume(self, step):
        del self.history[step:]
        state, self.version, _ = self.history[-1] if self.history else (None, 0, [])
        self.buffer = GroupBuffer(PROMPTS, seed=SEED, shuffle=True, state=state, step=step)

    def round(self, fates):
        issued = [self.buffer.issue() for _ in fates]
        for order, prompt in issued:
            assert prompt == self.sequence[order]  # a number keeps its prompt, also when it is issued again
        graded = [(group(*i, self.version), fate) for i, fate in zip(issued, fates, strict=True)]
        for one in graded[::-1]:  # the order in which answers end is not that of the issue
            self.buffer.graded(*one)

    def step(self, wanted, newer, rounds, dies):
        buffer, self.version = self.buffer, self.version + newer
        buffer.begin_step(self.version - 1)
        for fates in rounds:
            if len(buffer.kept) < wanted:
                self.round(fates)
        if dies is not None:
            return self.resume(dies % (len(self.history) + 1))
        if (deficit := wanted - len(buffer.kept)) > 0:
            self.round(["kept"] * deficit)
        number = len(self.history) + 1
        used, entries = buffer.end_step(wanted, number, self.version)
        orders = [g.order for g in used]
        assert len(orders) == wanted and orders == sorted(set(orders))
        assert all(g.oldest_version >= self.version - 1 for g in used)
        assert orders == [e.order for e in entries if e.fate == "kept"]
        assert all(e.step == number and e.prompt_id == self.sequence[e.order].id for e in entries)
        assert not buffer.issued
        self.history.append((encode_snapshot(buffer.snapshot()), self.version, entries))

    def check(self):
        settled = Counter(e.order for _, _, entries in self.history for e in entries if e.fate in SETTLED)
        state = self.buffer.state
        waiting = [g.order for g in self.buffer.kept] + [order for order, _ in state.again]
        assert len(set(waiting)) == len(waiting)
        assert settled == Counter(set(range(state.next_order)) - set(waiting))


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=12))
def test_every_number_is_settled_once(steps):
    run = Run()
    for step in steps:
        run.step(**step)
        run.check()


def test_what_is_with_the_engines_over_several_batches_is_told_once():
    buffer, told = GroupBuffer(PROMPTS, seed=SEED, shuffle=True), []
    issued = [buffer.issue() for _ in range(4)]
    for step in (1, 2, 3):
        buffer.begin_step(0)
        buffer.graded(group(*issued[step], 0), "kept")
        told += [(e.step, e.order, e.fate) for e in buffer.end_step(1, step, 0)[1]]
    # Number 0 never comes back, 2 and 3 do after the first batch.
    with_engines = [(step, order) for step, order, fate in told if fate == "issued"]
    assert sorted(with_engines) == [(1, 0), (1, 2), (1, 3)]
    assert [(step, order) for step, order, fate in told if fate == "kept"] == [(1, 1), (2, 2), (3, 3)]


def test_what_was_kept_steps_ago_counts_less_and_less():
    """Eight groups of which none is kept, beside four that were expected to be; then half as much at every batch."""
    buffer = GroupBuffer(PROMPTS, seed=SEED, shuffle=True)
    for number, prompt in [buffer.issue() for _ in range(8)]:
        buffer.graded(group(number, prompt, 0), "all_wrong")
    assert (buffer.share.kept, buffer.share.seen) == (4, 12)
    buffer.end_step(0, 1, 0)
    assert (buffer.share.kept, buffer.share.seen) == (2, 6)
    resumed = GroupBuffer(PROMPTS, seed=SEED, shuffle=True, state=encode_snapshot(buffer.snapshot()), step=1)
    assert (resumed.share.kept, resumed.share.seen) == (2, 6)


def test_other_prompts_than_the_run_began_with_are_refused():
    """Also the same ones in another order, and with another answer; the same ones go on."""
    state = encode_snapshot(GroupBuffer(PROMPTS, seed=SEED, shuffle=True).snapshot())
    answered = [msgspec.structs.replace(PROMPTS[0], ground_truth="another"), *PROMPTS[1:]]
    for others in (PROMPTS[::-1], answered):
        with pytest.raises(ConfigError, match="holds other prompts or answers than when the run began"):
            GroupBuffer(others, seed=SEED, shuffle=True, state=state, step=0)
    assert GroupBuffer(list(PROMPTS), seed=SEED, shuffle=True, state=state, step=0).issue()
