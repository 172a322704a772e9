"""Dynamic sampling over synthetic groups: what is kept, carried, issued again, and what the ledger says."""

import asyncio
import random

import pytest

from dapo_megatron.data.snapshot import decode_snapshot
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Prompt, ScoredGroup, VersionSpan
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.ledger import Ledger, read_ledger
from dapo_megatron.rollout.producer import Producer
from tests.tiny import response, run_config

PROMPTS = [Prompt(id=f"p{i}", input_ids=[1], ground_truth="", text="", row=i) for i in range(50)]


class World:
    """Makes groups whose verdicts depend on the prompt alone, finishing in random order."""

    def __init__(self, outcome):
        self.outcome, self.version, self.made, self.orders = outcome, 0, [], []

    async def make_group(self, prompt, order):
        version = self.version
        self.made.append(prompt.id)
        self.orders.append((prompt.id, order))
        await asyncio.sleep(random.random() * 0.003)
        verdicts = {"mixed": ["right", "wrong"], "all_right": ["right"] * 2, "all_wrong": ["wrong"] * 2}
        verdicts["ungraded"] = ["right", "unknown"]
        return ScoredGroup(
            order,
            prompt,
            [
                response(prompt.id, i, [1], version_spans=[VersionSpan(version, 0, 1)], verdict=v)
                for i, v in enumerate(verdicts[self.outcome(prompt)])
            ],
        )


def producer(tmp_path, world, state=None, cut=None, wanted=4, unknown="wrong", rollout=None, **algorithm):
    config = run_config(
        tmp_path,
        rollout={"prompts_per_step": wanted, "group_size": 2} | (rollout or {}),
        trainer={"mini_batch_prompts": 1},
        grading={"unknown": unknown},
        algorithm=algorithm,
    )
    buffer = GroupBuffer(PROMPTS, seed=config.seed, shuffle=config.data.shuffle, state=state, step=cut or 0)
    return Producer(config, buffer, world.make_group, Ledger(tmp_path / "ledger.jsonl", cut_to_step=cut))


def steps(c, world, first, last):
    async def run():
        out = []
        for step in range(first, last + 1):
            world.version = step - 1
            out.append(await c.produce(step, step - 1, lambda _: None))
        return out

    return asyncio.run(run())


def every_third(prompt):
    return ("mixed", "all_right", "all_wrong")[prompt.row % 3]


def test_steps_are_full_of_mixed_groups_in_issue_order(tmp_path):
    world = World(every_third)
    for collected in steps(producer(tmp_path, world), world, 1, 6):
        assert len(collected.groups) == 4
        assert all(every_third(g.prompt) == "mixed" for g in collected.groups)
        orders = [g.order for g in collected.groups]
        assert orders == sorted(orders)


def test_surplus_is_carried_and_consumed_first(tmp_path):
    world = World(every_third)
    results = steps(producer(tmp_path, world), world, 1, 6)
    carried = False
    for before, after in zip(results, results[1:], strict=False):
        if before.metrics["groups/surplus"]:
            carried = True
            consumed = after.metrics["groups/carried_in"] + after.metrics["groups/stale"]
            assert consumed == before.metrics["groups/surplus"]
            if after.metrics["groups/carried_in"] and after.seen:
                assert after.groups[0].order < min(g.order for g in after.seen)
    assert carried


def test_ledger_knows_every_prompt_once(tmp_path):
    world = World(every_third)
    c = producer(tmp_path, world)
    steps(c, world, 1, 6)
    last_fate = {e.order: e.fate for e in read_ledger(tmp_path / "ledger.jsonl")}
    assert sorted(last_fate) == list(range(c.buffer.state.next_order))
    assert list(last_fate.values()).count("kept") == 24
    assert not c.buffer.issued


def test_too_old_groups_are_issued_again(tmp_path):
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world)
    c.buffer.state.kept_share = 0.25  # the first round is four times too large
    first, second, third = steps(c, world, 1, 3)
    assert first.metrics["groups/surplus"] == 12
    assert second.metrics["groups/carried_in"] == 12 and second.metrics["groups/stale"] == 0
    # The eight that are left were sampled by version 0: at version 2 they are one version too old.
    assert third.metrics["groups/stale"] == 8 and third.metrics["groups/carried_in"] == 0
    assert {g.prompt.id for g in third.groups} <= set(world.made[:16])
    assert [g.order for g in third.groups] == [8, 9, 10, 11]


def test_hopeless_search_says_what_was_seen(tmp_path):
    world = World(lambda p: "all_right" if p.row % 5 else "all_wrong")
    with pytest.raises(DapoError) as e:
        steps(producer(tmp_path, world, max_generation_rounds=3), world, 1, 1)
    text = str(e.value)
    assert "after 3 rounds" in text and "0 of 4" in text and "all right" in text and "all wrong" in text
    assert "\n" not in text


def test_without_dynamic_sampling_every_group_is_kept(tmp_path):
    world = World(every_third)
    (collected,) = steps(producer(tmp_path, world, dynamic_sampling=False), world, 1, 1)
    assert [g.order for g in collected.groups] == [0, 1, 2, 3]


@pytest.mark.parametrize(("unknown", "trained"), [("wrong", {"mixed", "ungraded"}), ("mask", {"mixed"})])
def test_a_masked_answer_makes_no_group_mixed(tmp_path, unknown, trained):
    def outcome(prompt):
        return ("mixed", "ungraded")[prompt.row % 2]

    world = World(outcome)
    results = steps(producer(tmp_path, world, wanted=8, unknown=unknown), world, 1, 3)
    assert {outcome(g.prompt) for c in results for g in c.groups} == trained
    assert all(len(c.groups) == 8 for c in results)
    fates = {outcome(PROMPTS[int(e.prompt_id[1:])]): e.fate for e in read_ledger(tmp_path / "ledger.jsonl")}
    assert (fates["ungraded"] == "all_right") == (unknown == "mask")


def test_more_steps_than_prompts_go_on_with_the_next_epoch(tmp_path):
    world = World(lambda p: "mixed")
    steps(producer(tmp_path, world, wanted=30), world, 1, 4)
    assert {world.made.count(p.id) for p in PROMPTS} == {2, 3}


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_resumed_run_goes_on_as_if_never_stopped(tmp_path, cut):
    whole, half = World(every_third), World(every_third)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    expected = steps(producer(tmp_path / "a", whole), whole, 1, 6)
    before = steps(producer(tmp_path / "b", half), half, 1, 5)  # died in step 6, two steps after its checkpoint
    after = steps(producer(tmp_path / "b", half, state=before[cut - 1].state, cut=cut), half, cut + 1, 6)
    got = before[:cut] + after
    assert [[(g.order, g.prompt.id) for g in c.groups] for c in got] == [
        [(g.order, g.prompt.id) for g in c.groups] for c in expected
    ]
    assert [c.state for c in got] == [c.state for c in expected]
    assert read_ledger(tmp_path / "b" / "ledger.jsonl") == read_ledger(tmp_path / "a" / "ledger.jsonl")


@pytest.mark.parametrize("died_in", [3, 4, 5])
def test_what_was_with_the_engines_is_issued_again_also_when_generated_ahead(tmp_path, died_in):
    """As the controller with max_policy_lag 1: step k + 1 is begun when batch k leaves, under the version before."""

    async def ahead(c, world, first, last, dies=None):
        out, task = [], None
        for step in range(first, last + 1):
            version = step - 1
            out.append(await (task or c.produce(step, version, lambda _: None)))
            if dies == step + 1:
                # Killed with groups in flight.
                task = asyncio.ensure_future(c.produce(step + 1, version, lambda _: None))
                while not (task.done() or c.buffer.issued):
                    await asyncio.sleep(0)
                assert c.buffer.issued
                task.cancel()
                return out
            task = asyncio.ensure_future(c.produce(step + 1, version, lambda _: None)) if step < last else None
            await asyncio.sleep(0)
            world.version = version + 1  # the push, while the next step is being generated
        return out

    lag = {"max_policy_lag": 1}
    whole, half, rest = World(every_third), World(every_third), World(every_third)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    expected = asyncio.run(ahead(producer(tmp_path / "a", whole, wanted=7, rollout=lag), whole, 1, 6))
    before = asyncio.run(ahead(producer(tmp_path / "b", half, wanted=7, rollout=lag), half, 1, 6, dies=died_in))
    cut = died_in - 1
    assert decode_snapshot(before[-1].state, cut).next_order < max(o for _, o in half.orders) + 1
    rest.version = cut
    resumed = producer(tmp_path / "b", rest, state=before[-1].state, cut=cut, wanted=7, rollout=lag)
    after = asyncio.run(ahead(resumed, rest, died_in, 6))
    got = before + after
    assert [[(g.order, g.prompt.id) for g in c.groups] for c in got] == [
        [(g.order, g.prompt.id) for g in c.groups] for c in expected
    ]
    settled = [(e.order, e.prompt_id, e.fate) for e in read_ledger(tmp_path / "b" / "ledger.jsonl")]
    assert settled == [(e.order, e.prompt_id, e.fate) for e in read_ledger(tmp_path / "a" / "ledger.jsonl")]
    assert {o for _, o in half.orders if o >= decode_snapshot(before[-1].state, cut).next_order} <= {
        o for _, o in rest.orders
    }


def test_torn_ledger_line_is_left_out(tmp_path):
    world = World(every_third)
    steps(producer(tmp_path, world), world, 1, 2)
    path = tmp_path / "ledger.jsonl"
    whole = read_ledger(path)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "ord')
    assert read_ledger(path) == whole
