"""The rollout bank: what was finished comes back as it was; nothing torn, damaged, too old or of another run does."""

import asyncio
import math
import struct

import msgspec
import numpy as np
import pytest

from dapo_megatron.records import Prompt, ScoredGroup, VersionSpan
from dapo_megatron.rollout.bank import RolloutBank, responses_digest
from dapo_megatron.rollout.ledger import read_ledger
from dapo_megatron.run_folder import RunFolder
from tests.tiny import response, run_config, same
from tests.unit.rollout.test_producer import World, every_third, producer

STEP, VERSION = 12, 11
DIGEST = "d"


def prompt(order):
    return Prompt(f"p{order}", [1, order], "4", "2 + 2?", order)


def group(order, version=VERSION, oldest=None):
    spans = [VersionSpan(version if oldest is None else oldest, 0, 2), VersionSpan(version, 2, 3)]
    logprobs = [-0.1 * order, -1e-300, -3.0000000000000004]
    arrays = {"experts": np.array([math.nan, 1.0, math.inf])}
    fields = {"loss_mask": [True, False, True], "rollout_logprobs": logprobs, "version_spans": spans, "text": "4"}
    responses = [response(f"p{order}", i, [5, 6, i], token_arrays=arrays, **fields) for i in range(3)]
    return ScoredGroup(order, prompt(order), responses)


def bank(tmp_path, resume=STEP - 1, digest=DIGEST, limit=1 << 20, versions=range(VERSION, VERSION + 1)):
    opened = RolloutBank(RunFolder(tmp_path), digest, limit, resume)
    opened.begin_step(STEP, versions)
    return opened


@pytest.fixture
def path(tmp_path):
    """The file of a step with three groups, whose owner was killed."""
    opened = bank(tmp_path, 0)
    for order in (7, 5, 9):
        opened.add(group(order))
    return RunFolder(tmp_path).bank(STEP)


def in_it(tmp_path, **options):
    opened = bank(tmp_path, **options)
    found = [order for order in range(20) if opened.take(order, prompt(order)) is not None]
    assert opened.taken == len(found)
    return found


def test_what_was_finished_comes_back_once_and_as_it_was(tmp_path, path):
    opened = bank(tmp_path)
    assert [order for order in range(20) if opened.holds(order)] == [5, 7, 9]
    assert same(opened.take(5, prompt(5)), group(5)) and opened.take(5, prompt(5)) is None and not opened.holds(5)
    assert opened.take(6, prompt(6)) is None
    opened.add(group(6))
    opened.close()
    assert in_it(tmp_path) == [5, 6, 7, 9]


def test_another_config_step_or_run_gets_nothing(tmp_path, path, caplog):
    data = path.read_bytes()
    for options in ({"digest": "e"}, {"resume": 0}, {"resume": STEP}, {"resume": STEP - 2}):
        assert in_it(tmp_path, **options) == []
        assert ("of another config or version" in caplog.text) == ("digest" in options)
        caplog.clear()
        path.write_bytes(data)
    path.write_bytes(b"")
    path.with_name(f"step_{STEP + 1:06d}.bank").write_bytes(data)  # renamed
    opened = RolloutBank(RunFolder(tmp_path), DIGEST, 1 << 20, STEP)
    opened.begin_step(STEP + 1, range(100))
    assert opened.take(5, prompt(5)) is None and "of another config" in caplog.text


def test_a_prompt_that_reads_otherwise_now_is_generated(tmp_path, path):
    opened = bank(tmp_path)
    assert opened.take(5, msgspec.structs.replace(prompt(5), ground_truth="5")) is None
    assert opened.take(7, msgspec.structs.replace(prompt(7), id="p8")) is None
    assert opened.taken == 0


def test_every_token_must_be_of_a_version_that_may_be_trained(tmp_path):
    opened = bank(tmp_path, 0)
    for order, (oldest, newest) in enumerate([(11, 11), (10, 11), (10, 10), (9, 11), (11, 12), (9, 9)]):
        opened.add(group(order, newest, oldest))
    assert in_it(tmp_path) == [0]
    assert in_it(tmp_path, versions=range(VERSION - 1, VERSION + 1)) == [0, 1, 2]


def test_a_group_generated_again_stands_for_the_first(tmp_path, path):
    opened = bank(tmp_path, versions=range(VERSION + 1, VERSION + 2))
    assert opened.take(5, prompt(5)) is None
    opened.add(group(5, VERSION + 1))
    opened.close()
    assert in_it(tmp_path, versions=range(VERSION + 1, VERSION + 2)) == [5]


def test_torn_anywhere_the_whole_ones_come_back_and_more_can_be_added(tmp_path, path):
    data = path.read_bytes()
    (first,) = struct.unpack_from("<Q", data)
    starts = [0, first + 16]  # of the header and of the groups
    while starts[-1] < len(data):
        starts.append(starts[-1] + 16 + struct.unpack_from("<Q", data, starts[-1])[0])
    assert starts[-1] == len(data) and len(starts) == 5
    for size in range(0, len(data), 5):
        path.write_bytes(data[:size])
        whole = sum(start <= size for start in starts[2:])
        opened = bank(tmp_path)
        opened.add(group(15))
        opened.close()
        assert in_it(tmp_path) == sorted([7, 5, 9][:whole] + [15]), size


def test_a_flipped_bit_costs_what_comes_after_it(tmp_path, path, caplog):
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = in_it(tmp_path)
        assert found in ([], [7], [5, 7]), place
        assert "cut" in caplog.text or "generated again" in caplog.text
        caplog.clear()


def test_the_limit_holds_for_all_files_and_is_told_once(tmp_path, path, caplog):
    size = path.stat().st_size
    opened = bank(tmp_path, limit=size + 100)
    for order in (1, 2, 3):
        opened.add(group(order))
    assert path.stat().st_size == size and opened.missed == 3
    assert same(opened.take(5, prompt(5)), group(5))  # what is there can still be taken
    assert caplog.text.count(f"rollout.bank_bytes={size + 100} are full") == 1
    opened.begin_step(STEP + 1, range(20))  # the file before it counts
    opened.add(group(1))
    assert opened.missed == 1 and path.exists()
    nothing = bank(tmp_path, limit=0)
    nothing.add(group(1))
    assert nothing.missed == 0 and nothing.take(5, prompt(5)) is None


def test_a_full_or_missing_disk_costs_the_saving_and_is_told_once(tmp_path, path, caplog):
    opened = bank(tmp_path)
    size, file = path.stat().st_size, opened._file

    class Full:
        fileno, truncate, close = file.fileno, file.truncate, file.close

        def write(self, data):
            file.write(data[:10])
            return 10

    opened._file = Full()
    for order in (1, 2):
        opened.add(group(order))
    assert opened.missed == 2 and path.stat().st_size == size
    (line,) = caplog.text.splitlines()
    assert str(path) in line and "No space left on device: make room" in line
    assert in_it(tmp_path) == [5, 7, 9]

    other = tmp_path / "other"
    other.mkdir()
    (other / "bank").write_text("a file where the folder should be")
    opened = bank(other)
    opened.add(group(1))
    assert opened.missed == 1 and "make room, or check that the folder is there" in caplog.text


def test_files_of_steps_that_nobody_can_resume_are_removed(tmp_path):
    folder = RunFolder(tmp_path)
    opened = RolloutBank(folder, DIGEST, 1 << 20, 0)

    def left(step, *published):
        for number in published:
            folder.checkpoint(number).mkdir(parents=True)
            (folder.checkpoint(number) / "manifest.json").touch()
        opened.begin_step(step, range(step))
        opened.add(group(1, step))
        return sorted(int(p.stem[5:]) for p in folder.banks.iterdir())

    assert [left(1), left(2), left(3)] == [[1], [1, 2], [1, 2, 3]]
    assert left(4, 3) == [4]
    assert [left(5), left(6), left(7)] == [[4, 5], [4, 5, 6], [4, 6, 7]]
    folder.partial_checkpoint(6).mkdir()
    assert left(8) == [4, 7, 8]
    assert left(9, 6) == [7, 8, 9]
    RolloutBank(folder, DIGEST, 1 << 20, 6).end()  # killed in step 9
    assert [p.name for p in folder.banks.iterdir()] == ["step_000007.bank"]
    left(7, 7)
    opened.end()
    assert not list(folder.banks.iterdir())


@pytest.mark.parametrize(
    ("section", "changed", "matters"),
    [
        ("model", {"path": "other"}, True),
        ("rollout", {"temperature": 0.5}, True),
        ("rollout", {"group_size": 8}, True),
        ("algorithm", {"overlong_cache": 4}, True),
        ("grading", {"unknown": "mask"}, True),
        ("data", {"template": "boxed"}, True),
        ("engine", {"deterministic": True}, True),
        ("engine", {"dtype": "bfloat16"}, True),
        ("rollout", {"concurrency": 3, "bank_bytes": 1}, False),
        ("grading", {"workers": 7}, False),
        ("trainer", {"steps": 7}, False),
        ("engine", {"replicas": 2}, False),
    ],
)
def test_the_digest_is_of_what_responses_depend_on(tmp_path, section, changed, matters):
    assert (responses_digest(run_config(tmp_path)) != responses_digest(run_config(tmp_path, **{section: changed}))) == (
        matters
    )


@pytest.mark.parametrize("finished", [0, 1, 3, 7])
def test_a_resumed_step_generates_what_was_not_finished(tmp_path, finished):
    """A producer over a bank, killed in step 3 after some groups: the same steps and ledger, fewer groups made."""

    async def run(name, first, last, state=None, dies_after=None):
        world, folder = World(every_third), RunFolder(tmp_path / name)
        opened = RolloutBank(folder, DIGEST, 1 << 20, first - 1)
        cut = first - 1 if state else None
        made = producer(tmp_path / name, world, state=state, cut=cut, wanted=12, exact=True)
        generate = world.make_group

        async def make_group(prompt, order):
            if (banked := opened.take(order, prompt)) is not None:
                return banked
            if world.version == 2 and dies_after is not None and order - start >= dies_after:
                while len(finished_ones) < dies_after:
                    await asyncio.sleep(0.001)
                raise KeyboardInterrupt
            opened.add(done := await generate(prompt, order))
            if world.version == 2:
                finished_ones.append(order)
            return done

        made.make_group = make_group
        out, finished_ones = [], []
        for step in range(first, last + 1):
            world.version = step - 1
            opened.begin_step(step, range(step - 1, step))
            start = made.buffer.state.next_order
            out.append(await made.step(step, step - 1, lambda _: None))
            states.append(out[-1].state)
        return out, world, opened

    states = []
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    expected, whole, _ = asyncio.run(run("a", 1, 5))
    states = []
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run("b", 1, 5, dies_after=finished))
    got, rest, _ = asyncio.run(run("b", 3, 5, state=states[1]))
    assert same([c.groups for c in got], [c.groups for c in expected[2:]])
    assert read_ledger(tmp_path / "a" / "ledger.jsonl") == read_ledger(tmp_path / "b" / "ledger.jsonl")
    first_two = sum(len(c.seen) for c in expected[:2])
    in_bank = len(whole.made) - first_two - len(rest.made)
    assert in_bank == finished
