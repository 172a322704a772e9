"""From verdicts to rewards, advantages and masks."""

import copy
from collections import Counter

import pytest

from dapo_megatron.records import Group, Prompt, VersionSpan
from dapo_megatron.rollout.metrics import group_metrics, kept_cache_share, response_metrics
from dapo_megatron.rollout.scoring import score_group
from tests.tiny import response, run_config, same

PROMPT = Prompt(id="p", input_ids=[1], ground_truth="", text="", row=0)


def group(*responses):
    """(verdict, tokens, finish reason) each."""
    return Group(
        0,
        PROMPT,
        [
            response("p", i, [1] * n, finish_reason=finish, verdict=verdict)
            for i, (verdict, n, finish) in enumerate(responses)
        ],
    )


def scored(tmp_path, g, **sections):
    before = copy.deepcopy(g)
    responses = score_group(g, run_config(tmp_path, **sections)).responses
    assert same(g, before)  # the group itself is not changed
    return responses


def test_answers_without_a_verdict_are_counted_for_their_step(tmp_path):
    config = run_config(tmp_path)
    seen = [score_group(group(*([(v, 4, "stop") for v in verdicts])), config) for verdicts in UNKNOWN]
    assert response_metrics(seen[:1], seen, 0)["grading/unknown"] == 3
    assert response_metrics(seen[:1], seen[1:2], 0)["grading/unknown"] == 2
    assert response_metrics(seen[:1], [], 0)["grading/unknown"] == 0  # a step of carried groups alone


UNKNOWN = [("right", "unknown"), ("unknown", "unknown"), ("right", "wrong")]


def test_rewards_by_hand(tmp_path):
    """L_max 32, L_cache 8: 28 tokens are half-way, R = -1 - 0.5."""
    r = scored(
        tmp_path, group(("right", 10, "stop"), ("wrong", 10, "stop"), ("wrong", 28, "stop"), ("wrong", 32, "length"))
    )
    assert [x.reward for x in r] == [1.0, -1.0, -1.5, -2.0]
    # mean -0.875, unbiased std 1.31498
    assert [x.advantage for x in r] == pytest.approx([1.42588, -0.09506, -0.47529, -0.85553], abs=1e-4)
    assert all(all(x.loss_mask) for x in r)


def test_what_a_tool_said_is_not_overlong(tmp_path):
    """30 tokens of at most 32, 20 of them the policy's own: the punishment begins after 24."""
    g = group(("right", 30, "stop"), ("right", 30, "stop"))
    g.responses[1].version_spans = [VersionSpan(0, 0, 5), VersionSpan(0, 15, 30)]
    assert [r.overlong_penalty for r in scored(tmp_path, g)] == [-0.75, 0.0]


def test_unknown_is_wrong_by_default(tmp_path):
    r = scored(tmp_path, group(("right", 5, "stop"), ("unknown", 5, "stop")))
    assert [x.accuracy_reward for x in r] == [1.0, -1.0] and all(r[1].loss_mask)


def test_unknown_can_be_masked(tmp_path):
    g = group(("right", 5, "stop"), ("wrong", 5, "stop"), ("unknown", 5, "stop"))
    r = scored(tmp_path, g, grading={"unknown": "mask"})
    assert not any(r[2].loss_mask) and r[2].advantage == 0.0
    assert r[0].advantage == pytest.approx(-r[1].advantage) and r[0].advantage == pytest.approx(2**-0.5, rel=1e-5)


def test_overlong_filtering_masks_truncated_responses(tmp_path):
    g = group(("right", 5, "stop"), ("wrong", 32, "length"))
    r = scored(tmp_path, g, algorithm={"overlong_filtering": True})
    assert all(r[0].loss_mask) and not any(r[1].loss_mask) and r[1].advantage < 0


def test_shuffled_rewards_keep_the_counts(tmp_path):
    g = group(*[("right", 5, "stop")] * 3, *[("wrong", 5, "stop")] * 13)
    r = scored(tmp_path, g, algorithm={"shuffle_rewards": True})
    assert sum(x.verdict == "right" for x in r) == 3
    assert [x.verdict for x in r[:3]] != ["right"] * 3


def test_the_control_shuffles_own_rewards_with_their_verdicts(tmp_path):
    g = group(*[("right", 5, "stop")] * 4, *[("wrong", 5, "stop")] * 4)
    for i, r in enumerate(g.responses):
        r.accuracy_reward = float(i < 4)
    r = scored(tmp_path, g, algorithm={"shuffle_rewards": True})
    assert [x.accuracy_reward for x in r] == [float(x.verdict == "right") for x in r] != [1.0] * 4 + [0.0] * 4


def test_a_reward_of_the_rollouts_own_is_kept(tmp_path):
    g = group(("right", 5, "stop"), ("wrong", 5, "stop"), ("right", 28, "stop"))
    g.responses[0].accuracy_reward, g.responses[1].accuracy_reward = 0.25, -3.0
    r = scored(tmp_path, g)
    assert [x.reward for x in r] == [0.25, -3.0, 0.5]


def test_the_share_of_tokens_over_a_kept_cache_by_hand():
    def with_spans(mask, *spans):
        return response("p", 0, [1] * len(mask), loss_mask=mask, version_spans=[VersionSpan(*s) for s in spans])

    masks = [True, True, False, True, True, True]
    group = Group(0, Prompt("p", [1], "1", "", 0), [with_spans(masks, (3, 0, 2), (4, 2, 4), (5, 4, 6))])
    group.responses.append(with_spans([True] * 5, (4, 0, 5)))
    # Of the first response's trained tokens 3 of 5 came after a push; of the second's none of 5.
    assert kept_cache_share([group]) == 0.3
    assert response_metrics([group], [], 5, keeps_kv=True)["rollout/kept_cache_share"] == 0.3
    assert response_metrics([group], [], 5)["rollout/kept_cache_share"] == 0.0


def test_the_age_of_what_is_trained_counts_by_tokens():
    spans = [[VersionSpan(3, 0, 6), VersionSpan(5, 6, 10)], [VersionSpan(4, 0, 2)]]
    responses = [
        response("a", i, [5] * n, version_spans=own) for i, (n, own) in enumerate(zip((10, 2), spans, strict=True))
    ]
    seen = [Group(0, PROMPT, responses), Group(1, PROMPT, responses[:1])]
    found = response_metrics(seen[:1], seen, 6)
    assert found["rollout/lag_mean"] == (3 * 6 + 1 * 4 + 2 * 2) / 12 and found["rollout/lag_max"] == 3
    assert found["response/length_trained"] == 6 and found["response/length_mean"] == 22 / 3
    young = Group(2, PROMPT, responses[1:])
    assert response_metrics([young], [young], 6)["rollout/lag_max"] == 2
    assert response_metrics([young, seen[0]], seen, 6)["rollout/lag_max"] == 3


def test_a_step_of_carried_groups_alone_has_filtered_none():
    fates = Counter({"kept": 4, "carried": 1})
    found = group_metrics(fates, carried_in=5, rounds=1.0, fresh_kept=0, generated=0)
    assert found["groups/kept_share"] == 1 and (found["groups/kept"], found["groups/surplus"]) == (4, 1)
    assert group_metrics(fates, 0, 1.0, fresh_kept=5, generated=8)["groups/kept_share"] == 5 / 8
