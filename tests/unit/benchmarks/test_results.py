"""Medians, time to accuracy, and that both systems are given the same recipe."""

import random
from pathlib import Path
from statistics import median

import pytest
from benchmarks.results import Row, Run, from_metrics, from_trl, seconds_to, summarize, table
from benchmarks.workloads import LONGEST_RESPONSE, WORKLOADS, thought_length, trl_settings


def row(step, seconds, tokens=100.0, accuracy=None):
    phases = {"generate": 0.5, "old_logprobs": 0.1, "update": 0.2, "sync": 0.1}
    return Row(step, seconds, phases, tokens, 8.0, accuracy)


def test_medians_leave_out_the_first_steps():
    found = summarize([row(1, 50.0), row(2, 1.0), row(3, 2.0), row(4, 10.0)], skip=1)
    assert found.seconds == 2.0
    assert found.tokens_per_second == 50.0
    assert found.phases["rest"] == pytest.approx(1.1)


def test_nothing_left_to_measure_is_an_error():
    with pytest.raises(ValueError, match="none is left"):
        summarize([row(1, 1.0)], skip=1)


def test_time_to_accuracy_counts_every_step_up_to_the_evaluation():
    rows = [row(1, 1.0), row(2, 2.0, accuracy=0.6), row(3, 4.0), row(4, 8.0, accuracy=0.7), row(5, 16.0, accuracy=0.9)]
    assert seconds_to(rows, 0.7) == 15.0
    assert seconds_to(rows, 0.95) is None


def test_neither_evaluation_nor_verification_is_of_the_step():
    times = {"generate": 1.0, "old_logprobs": 0.25, "update": 0.5, "push": 0.125, "evaluate": 3.0, "verify": 2.0}
    record = {"step": 1, "rollout/response_tokens": 40.0, "response/length_max": 5.0, "eval/accuracy": 0.5}
    record |= {f"time/{name}": s for name, s in times.items()} | {"time/step": 4.0}
    before = {"step": 0, "time": 130.0, "time/evaluate": 10.0, "eval/accuracy": 0.25}
    run = from_metrics([before, record], "ours", started=100.0)
    assert run.startup == 20.0
    assert run.accuracy_before == 0.25
    assert run.rows == [
        Row(1, 2.0, {"generate": 1.0, "old_logprobs": 0.25, "update": 0.5, "sync": 0.125}, 40.0, 5.0, 0.5)
    ]


def test_an_evaluation_beside_training_is_not_of_the_start():
    before = {"step": 0, "time": 130.0, "eval/seconds": 10.0, "eval/accuracy": 0.25}
    assert from_metrics([before], "lag 1", started=100.0).startup == 20.0


def test_a_ratio_above_one_is_better_than_trl():
    slow, fast = (Run(name, 8.0, 0.25, [row(1, s), row(2, s, accuracy=0.75)]) for name, s in (("a", 4.0), ("b", 1.0)))
    trl = Run("TRL", 2.0, 0.25, [row(1, 2.0), row(2, 2.0, accuracy=0.75)])
    printed = table("short", [slow, fast], trl, 1, 0.5)
    assert [column.header for column in printed.columns] == ["", "a", "ratio", "b", "ratio", "TRL"]
    rows = {cells[0]: cells[1:] for cells in zip(*(column.cells for column in printed.columns), strict=True)}
    assert rows["response tokens trained a second"] == ("25", "0.50", "100", "2.00", "50")
    assert rows["seconds a step"] == ("4.000", "0.50", "1.000", "2.00", "2.000")
    assert rows["seconds to accuracy 50%"] == ("8.0", "0.50", "2.0", "2.00", "4.0")
    assert rows["accuracy before and after"] == ("25.0% -> 75.0%", "", "25.0% -> 75.0%", "", "25.0% -> 75.0%")
    assert rows["seconds to start"] == ("8.0", "0.25", "8.0", "0.25", "2.0")
    never = table("short", [slow, fast], trl, 1, 0.9)
    cells = [list(column.cells) for column in never.columns]
    assert [column[cells[0].index("seconds to accuracy 90%")] for column in cells[1:]] == [
        "not reached",
        "",
        "not reached",
        "",
        "not reached",
    ]


def test_rows_of_trl():
    line = {"step": 1, "seconds": 2.0, "generate": 1.0, "old_logprobs": 0.25, "update": 0.5, "lengths": [3, 4]}
    run = from_trl([{"step": 0, "time": 103.0}, line], "TRL, 1 thread", started=100.0)
    assert (run.startup, run.rows[0].tokens, run.rows[0].longest) == (3.0, 7.0, 4.0)
    assert run.rows[0].phases["sync"] == 0.0


def test_lengths_are_mostly_none_with_a_tail_up_to_the_limit():
    rng = random.Random(1)
    lengths = [thought_length(rng) for _ in range(20_000)]
    assert median(lengths) == 0
    assert 0.05 < sum(n > 0 for n in lengths) / len(lengths) < 0.07
    assert max(lengths) == LONGEST_RESPONSE
    assert 100 < sum(lengths) / sum(n > 0 for n in lengths) < 150  # the limit cuts the mean of 150


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_trl_gets_the_same_groups_updates_and_optimizer(workload):
    config = workload.recipe(Path("made"), Path("run"), steps=6, evaluate_every=3, extra=[])
    trl = trl_settings(config)
    responses_an_update = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
    assert responses_an_update == config.trainer.mini_batch_prompts * config.rollout.group_size
    generated = trl["per_device_train_batch_size"] * trl["steps_per_generation"]
    assert generated == config.rollout.prompts_per_step * config.rollout.group_size
    assert trl["max_steps"] == 6 * config.updates_per_step
    assert trl["max_completion_length"] == config.rollout.max_response_tokens
    assert (trl["epsilon"], trl["epsilon_high"]) == (config.algorithm.clip_low, config.algorithm.clip_high)
    assert (trl["learning_rate"], trl["weight_decay"]) == (config.optimizer.lr, config.optimizer.weight_decay)
    assert not config.algorithm.dynamic_sampling
