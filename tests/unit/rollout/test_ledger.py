"""What a ledger proves, and that it does not where a prompt was lost or used twice."""

import asyncio
import os
import random
import sys

import msgspec
import pytest

from dapo_megatron.data.snapshot import decode_snapshot
from dapo_megatron.observe.jsonl import append_lines
from dapo_megatron.rollout.ledger import Entry, Ledger, check_exactly_once, check_snapshot, read_ledger
from tests.unit.rollout.test_producer import PROMPTS, World, every_third, producer, trained
from tools.check_ledger import main

SIZE = len(PROMPTS)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Of a run of several epochs with max_policy_lag 1, killed and gone on with again and again."""
    folder = tmp_path_factory.mktemp("run")
    rng, states, at = random.Random(5), {}, 0
    while at < 30:
        last = min(30, at + rng.randint(1, 6))
        world = World(every_third)
        world.version = at
        resume = {"state": states[at], "cut": at} if at else {}
        made = producer(folder, world, wanted=3, rollout={"max_policy_lag": 1}, **resume)
        out = asyncio.run(trained(made, world, at + 1, last))
        states |= {at + 1 + i: produced.state for i, produced in enumerate(out)}
        at = last if last == 30 else max(0, last - rng.randint(0, 2))  # of an older checkpoint
    return (folder / "ledger.jsonl").read_bytes()


@pytest.fixture
def run(tmp_path, ledger):
    """Path of the ledger in a folder of its own."""
    (tmp_path / "ledger.jsonl").write_bytes(ledger)
    return tmp_path / "ledger.jsonl"


def test_a_resumed_run_with_lag_used_every_prompt_once(run):
    audit = check_exactly_once(read_ledger(run), SIZE)
    assert audit.problems == [] and audit.epochs == audit.frontier // SIZE >= 2
    assert audit.issued == audit.settled + len(audit.waiting)
    assert {e.fate for e in read_ledger(run)} >= {"kept", "all_right", "all_wrong", "carried"}


def planted(kind, entries):
    """One line that is too many or too few, of a prompt that was settled or carried."""
    settled = next(e for e in entries if e.fate == "kept" and e.order > 10)
    last = {e.order: e for e in entries}
    carried = next(e for e in entries if e.fate == "carried" and last[e.order].fate == "kept")
    match kind:
        case "used twice":
            return [*entries, msgspec.structs.replace(settled, step=30)]
        case "filtered and used":
            filtered = next(e for e in entries if e.fate == "all_wrong")
            return [*entries, msgspec.structs.replace(filtered, step=30, fate="kept")]
        case "carried after use":
            return [*entries, msgspec.structs.replace(settled, step=30, fate="carried")]
        case "lost":
            return [e for e in entries if e.order != settled.order]
        case "stale from nothing":
            return [e for e in entries if e != carried and e.order != carried.order] + [
                msgspec.structs.replace(carried, fate="stale")
            ]
        case "number of two prompts":
            return [msgspec.structs.replace(e, prompt_id="p49") if e == carried else e for e in entries]
        case "prompt twice in an epoch":
            return [msgspec.structs.replace(e, prompt_id="p0") if e.order == settled.order else e for e in entries]
        case "carried and lost":
            return [e for e in entries if e.order != carried.order or e == carried]
        case "issued again though not stale":
            return [
                msgspec.structs.replace(e, fate="all_wrong") if e == last[carried.order] else e
                for e in entries
                if e.order != carried.order or e in (carried, last[carried.order])
            ]
        case "steps in disorder":
            return [msgspec.structs.replace(e, step=31) if e == carried else e for e in entries]
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("used twice", "was settled, and used again: "),
        ("filtered and used", "all_wrong in step"),
        ("carried after use", "carried in step 30"),
        ("lost", "was issued and is not in the ledger"),
        ("stale from nothing", "went stale without having been carried"),
        ("number of two prompts", "is of 2 prompts"),
        ("prompt twice in an epoch", "prompt 'p0' was issued 2 times in epoch"),
        ("carried and lost", "and is missing from step"),
        ("issued again though not stale", "though it was not stale"),
        ("steps in disorder", "carried in step 31, "),
    ],
)
def test_a_planted_fault_is_found(run, kind, says, capsys):
    entries = planted(kind, read_ledger(run))
    problems = check_exactly_once(entries, SIZE).problems
    assert any(says in problem for problem in problems), problems
    run.unlink()
    append_lines(run, [msgspec.to_builtins(e) for e in entries])
    assert tool(run.parent, "--prompts", str(SIZE)) == 1
    out, err = capsys.readouterr()
    assert says in err and "error: " in err and "skipped or used twice" not in out


def test_what_is_settled_is_on_the_disk(tmp_path, monkeypatch):
    """Before the batch leaves: a checkpoint of its step must not outlive its lines."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.settle([Entry(1, 0, "p0", "kept", 0), Entry(1, 1, "p1", "carried", 0)])
    assert synced == [ledger.path.stat().st_size] and len(read_ledger(ledger.path)) == 2


def test_a_snapshot_that_has_lost_a_waiting_number_is_found(tmp_path):
    world = World(every_third)
    made = producer(tmp_path, world, wanted=3, rollout={"max_policy_lag": 2})
    steps = enumerate(asyncio.run(trained(made, world, 1, 4)), start=1)
    states = [decode_snapshot(produced.state, step) for step, produced in steps]
    entries = read_ledger(tmp_path / "ledger.jsonl")
    assert [check_snapshot(entries, state) for state in states] == [[], [], [], []]
    told = [Entry(1, 0, "p0", "kept", 0), Entry(1, 1, "p1", "issued", -1), Entry(2, 2, "p2", "issued", -1)]
    state = msgspec.structs.replace(states[0], step=1, next_order=2, carried=[], again=[(1, "p1")])
    assert check_snapshot(told, state) == []  # number 2 was issued later
    for change, says in [
        ({"again": []}, "number 1 waits, and the checkpoint of step 1 does not have it"),
        ({"again": [(0, "p0"), (1, "p1")]}, "number 0 is settled, and waits in the checkpoint of step 1"),
        ({"next_order": 3}, "the checkpoint of step 1 has 3 numbers issued, the ledger 2"),
    ]:
        assert check_snapshot(told, msgspec.structs.replace(state, **change)) == [says]


def test_a_prompt_missing_from_an_epoch_is_found():
    entries = [Entry(1, order, f"p{order % 3}", "kept", 0) for order in range(9)]
    assert check_exactly_once(entries, 3).epochs == 3
    entries[7] = msgspec.structs.replace(entries[7], prompt_id="p9")
    assert check_exactly_once(entries, 3).problems == [
        "prompt 'p9' is missing from epoch 0",
        "prompt 'p9' is missing from epoch 1",
        "prompt 'p1' is missing from epoch 2",
    ]


def test_many_problems_are_told_in_few_lines():
    entries = [Entry(1, order, f"p{order}", "kept", 0) for order in range(100)] * 2
    problems = check_exactly_once(entries).problems
    assert len(problems) == 6 and problems[-1] == "... and 95 more like it"
    assert check_exactly_once([]).issued == 0 and check_exactly_once([], 5).problems == []


def tool(*arguments):
    before, sys.argv = sys.argv, ["check_ledger", *map(str, arguments)]
    try:
        return main()
    finally:
        sys.argv = before


def test_the_tool_tells_what_the_ledger_shows(run, capsys):
    assert tool(run.parent, "--prompts", SIZE) == 0
    out = capsys.readouterr().out
    epochs = check_exactly_once(read_ledger(run), SIZE).epochs
    assert f"; {epochs} whole epochs\n" in out and "no prompt was skipped or used twice" in out
    assert tool(run.parent) == 0 and "epochs are not known" in capsys.readouterr().out
    assert tool(run.parent / "none") == 1 and "give the folder of a run" in capsys.readouterr().err
    append_lines(run, [{"step": 1, "order": "x"}])
    assert tool(run.parent) == 1 and "no entry of a ledger" in capsys.readouterr().err
