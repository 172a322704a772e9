"""What is said of generated groups, and which prompts are asked."""

import pytest

from dapo_megatron.records import Prompt, ScoredGroup
from dapo_megatron.rollout.buffer import GroupBuffer
from dapo_megatron.rollout.survey.generate import first_prompts
from dapo_megatron.rollout.survey.tally import Tally, quantile
from tests.tiny import response, run_config

PROMPTS = [Prompt(f"p{i}", [1], "1", "?", i) for i in range(9)]


def group(order, verdicts, lengths, reasons=None):
    responses = [
        response("p", i, [3] * n, verdict=v, finish_reason=(reasons or {}).get(i, "stop"), accuracy_reward=1.0 - i)
        for i, (v, n) in enumerate(zip(verdicts, lengths, strict=True))
    ]
    return ScoredGroup(order, PROMPTS[order], responses)


def test_groups_are_counted(tmp_path):
    tally = Tally(run_config(tmp_path, rollout={"prompts_per_step": 6, "group_size": 2}))
    tally.add(group(0, ["right", "wrong"], [4, 12]))
    tally.add(group(1, ["right", "right"], [2, 6]))
    tally.add(group(2, ["wrong", "unknown"], [32, 7], {0: "length"}))
    tally.add(group(3, ["wrong", "right"], [1, 16]))
    rows = dict(tally.rows(seconds=4.0))
    assert rows["prompts"] == "4, 2 responses each"
    assert rows["accuracy"] == "50.0% of responses"
    assert rows["prompts with a right response"] == "75.0% (3)"
    assert rows["mixed groups (what DAPO trains)"] == "50.0% (2)"
    assert rows["all right"] == rows["all wrong"] == "25.0% (1)"
    assert rows["mean reward"] == "0.500"
    assert rows["response length, mean"] == "10 tokens"
    assert rows["response length"] == "p50 6, p90 32, p99 32, max 32"
    assert rows["truncated"] == "12.5% of responses, at 32 tokens"
    assert rows["without a verdict"] == "1 responses"
    assert rows["generated"] == "80 tokens in 4.0 s, 20 tokens/s"
    assert rows["a step needs"] == "about 12 groups for 6 mixed ones"


def test_without_a_mixed_group_no_step_is_forecast(tmp_path):
    tally = Tally(run_config(tmp_path))
    tally.add(group(0, ["right", "right"], [4, 12]))
    assert "a step needs" not in dict(tally.rows(seconds=1.0))


@pytest.mark.parametrize(("unknown", "outcome"), [("wrong", "mixed"), ("mask", "all_right")])
def test_a_masked_answer_counts_as_in_training(tmp_path, unknown, outcome):
    # Whether dynamic sampling is on or not.
    config = run_config(tmp_path, grading={"unknown": unknown}, algorithm={"dynamic_sampling": False})
    tally = Tally(config)
    tally.add(group(0, ["right", "unknown"], [4, 12]))
    assert dict(tally.outcomes) == {outcome: 1}


@pytest.mark.parametrize(
    ("values", "share", "expected"), [([5], 0.5, 5), ([4, 1, 3, 2], 0.5, 2), (list(range(1, 101)), 0.99, 99)]
)
def test_quantiles(values, share, expected):
    assert quantile(values, share) == expected


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_prompts_are_those_that_a_training_is_issued_first(tmp_path, shuffle):
    config = run_config(tmp_path, data={"shuffle": shuffle})
    buffer = GroupBuffer(PROMPTS, seed=config.seed, shuffle=shuffle)
    issued = [buffer.issue() for _ in range(9)]
    assert list(enumerate(first_prompts(config, PROMPTS, 5))) == issued[:5]
    assert list(enumerate(first_prompts(config, PROMPTS, 50))) == issued  # at most one a prompt
