"""What becomes of a graded group, which groups a step takes, and how many are issued."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.records import Group, Prompt, VersionSpan
from dapo_megatron.rollout.selection import MAX_OVERSAMPLE, Share, by_age, fate_of, groups_to_issue, take
from tests.tiny import response, run_config

PROMPT = Prompt(id="p", input_ids=[1], ground_truth="", text="", row=0)


def group(*verdicts):
    responses = [response("p", i, [1], verdict=verdict) for i, verdict in enumerate(verdicts)]
    return Group(0, PROMPT, responses)


@pytest.mark.parametrize(
    ("verdicts", "as_wrong", "masked"),
    [
        (("right", "wrong"), "kept", "kept"),
        (("right", "right"), "all_right", "all_right"),
        (("wrong", "wrong"), "all_wrong", "all_wrong"),
        (("right", "unknown"), "kept", "all_right"),
        (("unknown", "right", "right"), "kept", "all_right"),
        (("wrong", "unknown"), "all_wrong", "all_wrong"),
        (("unknown", "unknown"), "all_wrong", "all_wrong"),
        (("right", "unknown", "wrong"), "kept", "kept"),
    ],
)
def test_an_answer_without_a_verdict_is_wrong_or_does_not_count(tmp_path, verdicts, as_wrong, masked):
    assert fate_of(group(*verdicts), run_config(tmp_path)) == as_wrong
    assert fate_of(group(*verdicts), run_config(tmp_path, grading={"unknown": "mask"})) == masked
    assert fate_of(group(*verdicts), run_config(tmp_path, algorithm={"dynamic_sampling": False})) == "kept"


@given(st.integers(1, 600), st.floats(0.3, 1), st.floats(0, 3))
def test_the_fewest_are_issued_that_leave_the_margin(missing, share, sigmas):
    def surely_kept(n):
        return n * share - sigmas * math.sqrt(n * share * (1 - share))

    n = groups_to_issue(missing, 0, share, sigmas)
    limit = math.ceil(missing * MAX_OVERSAMPLE)
    assert n == limit or surely_kept(n) >= missing - 1e-6
    assert surely_kept(n - 1) < missing + 1e-6
    assert groups_to_issue(missing, n - 1, share, sigmas) == 1 and groups_to_issue(missing, n + 1, share, sigmas) == 0


def test_numbers_by_hand():
    # 1074 x 0.5 = 537, less 1.5 x sqrt(1074 x 0.25) = 24.6: 512.4.
    assert groups_to_issue(512, 0, 0.5, 1.5) == 1074
    assert groups_to_issue(512, 1000, 0.5, 0.0) == 24
    assert groups_to_issue(7, 0, 1.0, 1.5) == 7 and groups_to_issue(0, 0, 0.5, 1.5) == 0
    assert groups_to_issue(10, 0, 0.0, 1.5) == 40  # hopeless data are not flooded


def test_the_share_counts_groups_and_forgets():
    share = Share()
    assert share.value == 1.0
    for kept in [True] * 10 + [False] * 6:
        share.count(kept=kept)
    assert share.value == 14 / 20
    share.age()
    assert share.value == 14 / 20 and share.seen == 10
    share.count(kept=False)
    assert share.value == 7 / 11


def scored(order, version):
    return Group(order, PROMPT, [response("p", 0, [1], version_spans=[VersionSpan(version, 0, 1)])])


def test_what_would_be_too_old_is_taken_first_then_the_earliest_issued():
    kept = [scored(5, 3), scored(9, 2), scored(1, 3), scored(7, 2), scored(2, 3)]
    used, carried = take(kept, 3, oldest=3)
    assert [g.order for g in used] == [1, 7, 9] and [g.order for g in carried] == [2, 5]
    used, carried = take(kept, 3, oldest=2)
    assert [g.order for g in used] == [1, 2, 5] and [g.order for g in carried] == [7, 9]
    young, old = by_age(kept, 3)
    assert [g.order for g in young] == [5, 1, 2] and [g.order for g in old] == [9, 7]
