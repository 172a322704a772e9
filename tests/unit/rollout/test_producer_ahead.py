"""Groups that are generated while others are trained: how old they get, how many are issued, what a kill leaves."""

import asyncio
import random

import pytest

from dapo_megatron.data.snapshot import decode_snapshot
from dapo_megatron.engines.client import Unanswered
from dapo_megatron.errors import DapoError
from dapo_megatron.records import ScoredGroup, VersionSpan
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.ledger import check_exactly_once, read_ledger
from tests.tiny import response
from tests.unit.rollout.test_producer import PROMPTS, World, every_third, producer, trained


@pytest.mark.parametrize(("lag", "seed"), [(1, 0), (1, 1), (2, 2), (4, 3), (8, 4)])
def test_with_a_lag_every_number_is_settled_once_across_kills(tmp_path, lag, seed):
    rng, at, states = random.Random(seed), 0, {0: None}
    rollout = {"max_policy_lag": lag}
    while at < 30:
        world = World(every_third)
        world.version = at
        c = producer(tmp_path, world, wanted=3, rollout=rollout, state=states[at], cut=at or None)
        last = min(30, at + rng.randint(1, 8))
        out = asyncio.run(trained(c, world, at + 1, last))
        states |= {at + 1 + i: made.state for i, made in enumerate(out)}
        snapshot = decode_snapshot(states[last], last)
        assert {order for order, _ in snapshot.again} <= set(range(snapshot.next_order))
        at = last if last == 30 else max(0, last - rng.randint(0, 2))
    audit = check_exactly_once(read_ledger(tmp_path / "ledger.jsonl"), len(PROMPTS))
    assert audit.problems == [] and audit.settled > 80


def test_a_slow_group_is_waited_for_before_it_is_too_old_and_not_sooner(tmp_path):
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world, wanted=2, rollout={"max_policy_lag": 2})
    make_group, release = world.make_group, None

    async def make(prompt, order):
        group = await make_group(prompt, order)
        if order == 1:
            await release.wait()
        return group

    async def run():
        nonlocal release
        release, out = asyncio.Event(), []
        c.make_group = make
        for step in (1, 2):  # versions 0 and 1: the slow group of version 0 may still be trained by version 2
            out.append(await asyncio.wait_for(c.step(step, step - 1, lambda _: None), 5))
            c.run_ahead()
            world.version = step
        third = asyncio.ensure_future(c.step(3, 2, lambda _: None))
        await asyncio.sleep(0.1)
        assert not third.done() and len(c.buffer.kept) >= 2
        release.set()
        out.append(await asyncio.wait_for(third, 5))
        await c.close()
        return out

    first, second, third = asyncio.run(run())
    assert [1 in [g.order for g in step.groups] for step in (first, second, third)] == [False, False, True]
    assert third.metrics["groups/stale"] == 0
    # Whoever goes on from the second step has it made again, under its number.
    buffer = GroupBuffer(PROMPTS, seed=c.config.seed, shuffle=c.config.data.shuffle, state=second.state, step=2)
    assert buffer.issue()[0] == 1


def test_what_an_earlier_start_has_finished_is_in_the_batch_or_carried_and_not_too_old_before(tmp_path):
    """Its bank has more groups of version 0 than the batch of version 1 needs, and gives one after the other."""
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world, wanted=2, rollout={"max_policy_lag": 1})
    make_group, banked = world.make_group, range(4)

    async def make(prompt, order):
        if order in banked:
            await asyncio.sleep(0.03 * order)
            world.version = 0
        group = await make_group(prompt, order)
        world.version = 1
        return group

    async def run():
        c.make_group, c._is_finished = make, banked.__contains__
        first = await c.step(2, 1, lambda _: None)
        assert [g.order for g in first.groups] == [0, 1] and [g.order for g in c.buffer.kept] == [2, 3]
        c.run_ahead()
        await c.step(3, 2, lambda _: None)
        await c.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    entries = read_ledger(tmp_path / "ledger.jsonl")
    assert [e.fate for e in entries if e.order == 3][:2] == ["carried", "stale"]
    assert check_exactly_once(entries).problems == []


def test_a_group_that_is_issued_again_is_as_old_as_its_last_issue(tmp_path):
    """Its answers are of the version that is live then: a step does not wait for it sooner."""
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world, wanted=2, rollout={"max_policy_lag": 2, "max_reissues": 1})

    async def run():
        lost, calls = asyncio.Event(), []

        async def make(prompt, order):
            if order == 0:
                calls.append(c._version)
                await (lost if len(calls) == 1 else asyncio.Event()).wait()
                raise Unanswered("its engine died")
            return await world.make_group(prompt, order)

        c.make_group = make
        for step in (1, 2, 3):  # version 2 would have to wait for a group of version 0
            await asyncio.wait_for(c.step(step, step - 1, lambda _: None), 5)
            if step == 2:
                lost.set()
                await asyncio.sleep(0.01)
            c.run_ahead()
            world.version = step
        await c.close()
        return calls

    assert asyncio.run(run()) == [0, 1]


def test_what_the_next_step_could_not_train_is_taken_first(tmp_path):
    """Number 0 waited in a queue over a push, number 1 did not: version 2 could not train it any more."""
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world, wanted=1, rollout={"max_policy_lag": 1})
    sampled_by = {0: 1, 1: 0}

    async def make(prompt, order):
        if order not in sampled_by:
            await asyncio.Event().wait()
        spans = [VersionSpan(sampled_by[order], 0, 1)]
        verdicts = ("right", "wrong")
        return ScoredGroup(
            order, prompt, [response(prompt.id, i, [1], version_spans=spans, verdict=v) for i, v in enumerate(verdicts)]
        )

    async def run():
        c.make_group = make
        out = [await c.step(2, 1, lambda _: None), await c.step(3, 2, lambda _: None)]
        await c.close()
        return out

    assert [[g.order for g in made.groups] for made in asyncio.run(run())] == [[1], [0]]


def test_ahead_of_the_trainer_as_many_are_issued_as_its_lag_allows_and_a_batch_more_while_it_waits(tmp_path):
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world, wanted=3, rollout={"max_policy_lag": 1}, dynamic_sampling=False)

    async def run():
        release = asyncio.Event()

        async def make(prompt, order):
            await release.wait()
            return await world.make_group(prompt, order)

        c.make_group = make
        step = asyncio.ensure_future(c.step(1, 0, lambda _: None))
        await asyncio.sleep(0)
        assert c.buffer.state.next_order == 6
        release.set()
        await step
        while c.buffer.issued:
            await asyncio.sleep(0.001)
        c.run_ahead()
        assert len(c.buffer.kept) == 3 and not c.buffer.issued  # a batch is ready: what is newer then will be better
        await c.close()

    asyncio.run(run())


def test_the_engines_get_few_more_groups_than_they_have_room_for(tmp_path):
    """Room for 8 responses is room for four groups of two; one more waits beside them."""
    world, most = World(every_third), 0
    c = producer(tmp_path, world, wanted=20, rollout={"max_policy_lag": 2, "concurrency": 8})
    make_group = world.make_group

    async def make(prompt, order):
        nonlocal most
        most = max(most, len(c.buffer.issued))
        return await make_group(prompt, order)

    c.make_group = make
    asyncio.run(trained(c, world, 1, 3))
    assert most == 5


def test_an_error_between_two_steps_is_raised_by_the_next(tmp_path):
    world = World(lambda p: "mixed")
    c = producer(tmp_path, world, wanted=2, rollout={"max_policy_lag": 1})
    make_group = world.make_group

    async def make(prompt, order):
        if order == 3:
            await failing.wait()
            raise DapoError(f"group {order} failed")
        return await make_group(prompt, order)

    async def run():
        nonlocal failing
        failing, c.make_group = asyncio.Event(), make
        await c.step(1, 0, lambda _: None)
        c.run_ahead()
        failing.set()
        await asyncio.sleep(0.02)
        with pytest.raises(DapoError, match="group . failed"):
            await c.step(2, 1, lambda _: None)
        assert len(asyncio.all_tasks()) == 1

    failing = None
    asyncio.run(run())
