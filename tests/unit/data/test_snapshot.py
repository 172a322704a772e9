"""The controller's state in a checkpoint: it comes back bit for bit, and what is damaged is refused in one line."""

import re
import struct

import msgspec
import numpy as np
import pytest

from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.data.snapshot import (
    DataCursor,
    Snapshot,
    cursor_of,
    decode_snapshot,
    encode_snapshot,
    snapshot_parts,
)
from dapo_megatron.errors import DapoError
from dapo_megatron.records import Prompt, ScoredGroup, VersionSpan
from tests.tiny import response, same

LOGPROBS = [-0.1, -1e-38, -0.0, -123456.789, -3.0]


def snapshot(**changes):
    sampler = PromptSampler(7, 3)
    for _ in range(17):
        sampler.next()
    prompt = Prompt("a/b.jsonl:4", [1, 2], "4", "2 + 2 = \u2028?\x00\N{GRINNING FACE}", 4, ["four"])
    fields = {"rollout_logprobs": LOGPROBS, "version_spans": [VersionSpan(2, 0, 3), VersionSpan(3, 3, 5)]}
    group = ScoredGroup(15, prompt, [response(prompt.id, 0, [5] * 5, text="\\boxed{4}", **fields)])
    return msgspec.structs.replace(
        Snapshot(12, sampler.state(), 17, (0.1 + 0.2, 4.0), [group], [(9, "a/b.jsonl:1")]), **changes
    )


def test_it_comes_back_bit_for_bit():
    before = snapshot()
    after = decode_snapshot(encode_snapshot(before), 12)
    assert same(after, before)
    assert after.carried[0].responses[0].rollout_logprobs.tobytes() == struct.pack("5f", *LOGPROBS)
    assert cursor_of(encode_snapshot(before), 12) == DataCursor(
        step=12, epoch=2, position=3, next_order=17, carried=1, again=1
    )
    assert msgspec.json.decode(encode_snapshot(before))["next_order"] == 17  # JSON, for whoever looks


def test_the_end_of_an_epoch_is_a_place_to_stand():
    at_end = msgspec.structs.replace(snapshot().sampler, epoch=1, position=7)
    assert decode_snapshot(encode_snapshot(snapshot(sampler=at_end, next_order=14, carried=[])), 12).sampler == at_end


def test_it_travels_in_parts(monkeypatch):
    monkeypatch.setattr("dapo_megatron.data.snapshot.PART_BYTES", 100)
    whole = encode_snapshot(snapshot())
    parts = snapshot_parts(whole)
    assert b"".join(parts) == whole and {len(p) for p in parts[:-1]} == {100} and 0 < len(parts[-1]) <= 100
    assert snapshot_parts(b"") == []


def test_cut_anywhere_it_is_refused_in_a_line():
    whole = encode_snapshot(snapshot())
    for cut in [
        b"",
        b'{"x":' + b"[" * 100_000,
        *(whole[:n] for n in range(1, len(whole), 7)),
        whole[:-1],
        whole + b"x",
    ]:
        with pytest.raises(DapoError, match="damaged: it cannot be read") as e:
            decode_snapshot(cut, 12)
        assert "\n" not in str(e.value)


def sampler(**changes):
    return msgspec.structs.replace(snapshot().sampler, **changes)


GROUP = snapshot().carried[0]


def carried(**changes):
    (whole,) = GROUP.responses
    return ScoredGroup(15, GROUP.prompt, [msgspec.structs.replace(whole, **changes)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": 11}, "it is of step 11, the checkpoint is of step 12"),
        ({"schema": 2}, "its schema is 2"),
        ({"next_order": 16}, "16 prompts were issued, the cursor stands at prompt 3 of 7 in epoch 2"),
        ({"sampler": sampler(position=4)}, "17 prompts were issued, the cursor stands at prompt 4"),
        ({"sampler": sampler(epoch=1, position=10)}, "its cursor stands at prompt 10 of 7"),
        ({"sampler": sampler(epoch=-1)}, "in epoch -1"),
        ({"sampler": sampler(size=0)}, "of 0 in epoch"),
        ({"share": (-1.0, 2.0)}, "it counts -1.0 groups kept of 2.0"),
        ({"share": (3.0, 2.0)}, "it counts 3.0 groups kept of 2.0"),
        ({"share": (0.0, 0.0)}, "it counts 0.0 groups kept of 0.0"),
        ({"carried": [GROUP, GROUP]}, "numbers [15, 15, 9] wait"),
        ({"again": [(15, "p")]}, "numbers [15, 15] wait"),
        ({"again": [(17, "p")]}, "of 17 prompts issued, numbers [15, 17] wait"),
        ({"again": [(-1, "p")]}, "of 17 prompts issued, numbers [15, -1] wait"),
        ({"carried": [ScoredGroup(15, GROUP.prompt, [])]}, "group 15 is carried without responses"),
        ({"carried": [carried(token_ids=np.zeros(0, np.int32))]}, "group 15 is carried without responses"),
        ({"carried": [carried(version_spans=[])]}, "group 15 is carried without responses"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes, says):
    with pytest.raises(DapoError, match=re.escape(says)) as e:
        decode_snapshot(encode_snapshot(snapshot(**changes)), 12)
    assert "\n" not in str(e.value) and "resume from another checkpoint" in str(e.value)
