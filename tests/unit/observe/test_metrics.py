import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dapo_megatron.errors import DapoError, DataError
from dapo_megatron.observe.catalog import reduce_updates
from dapo_megatron.observe.metrics import MetricsWriter, read_metrics
from dapo_megatron.observe.pace import Pace, is_complete, pace
from dapo_megatron.run_folder import RunFolder
from tests.tiny import run_config


def open_writer(run_dir, resume_step=None, **options):
    return MetricsWriter(
        RunFolder(run_dir), **{"tensorboard": False, "wandb_project": None} | options, resume_step=resume_step
    )


def steps(run_dir):
    return [record["step"] for record in read_metrics(RunFolder(run_dir))]


def test_round_trip_keeps_every_name_and_non_finite_values_become_nan(tmp_path):
    record = {"step": 1, "time": 1.7e9, "version": 2, "reward/mean": 0.1 + 0.2, "my own/metric": math.inf}
    open_writer(tmp_path).write(record | {"policy/loss": math.nan, "a/b": np.float32(0.5), "c/d": torch.tensor(2.0)})

    (back,) = read_metrics(RunFolder(tmp_path))
    assert back["reward/mean"] == 0.1 + 0.2 and back["step"] == 1 and back["version"] == 2
    assert math.isnan(back["policy/loss"]) and math.isnan(back["my own/metric"])
    assert back["a/b"] == 0.5 and back["c/d"] == 2.0
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"step": 2', "not JSON"),
        ("[2]", "no object with the number of a step"),
        ('{"version": 2}', "no object with the number of a step"),
        ('{"step": "2"}', "no object with the number of a step"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, says):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=f"metrics.jsonl, line 2: {says}.*; remove the line"):
        read_metrics(RunFolder(tmp_path))


def test_a_steps_updates_are_one_record():
    """Means of what is a mean, the largest difference, the smallest norm, the last rate, and how many were skipped."""
    first = {"policy/loss": 1.0, "mismatch/abs_max": 0.5, "optimizer/grad_norm_min": 3.0}
    second = {"policy/loss": 2.0, "mismatch/abs_max": 0.1, "optimizer/grad_norm_min": 4.0}
    updates = [
        first | {"optimizer/lr": 1e-6, "optimizer/skipped": 1.0},
        second | {"optimizer/lr": 2e-6, "optimizer/skipped": 1.0},
    ]
    assert reduce_updates(updates) == {
        "policy/loss": 1.5,
        "mismatch/abs_max": 0.5,
        "optimizer/grad_norm_min": 3.0,
        "optimizer/lr": 2e-6,
        "optimizer/skipped": 2.0,
    }


def test_the_pace_is_that_of_the_last_ten_steps():
    """A slow beginning (compilation, a cold disk) is soon forgotten; one slow step is no pace."""
    records = [{"step": float(s), "time/step": 100.0 if s <= 20 or s == 27 else 2.0} for s in range(1, 31)]
    assert pace([{"step": 0.0}, *records, {"step": 30.0}], 40) == Pace(2.0, 20.0)
    assert pace(records, 30) == Pace(2.0, 0.0) and pace([{"step": 0.0}], 40) is None


@pytest.mark.parametrize(
    ("held_out", "records", "found"),
    [
        ("eval.jsonl", [{"step": 3, "eval/accuracy": 0.1}], False),
        ("eval.jsonl", [{"step": 4}], False),  # its evaluation was cut short
        ("eval.jsonl", [{"step": 4, "eval/accuracy": 0.1}], True),
        ("eval.jsonl", [{"step": 2, "eval/accuracy": 0.5}], True),  # the goal
        (None, [{"step": 4}], True),
        (None, [], False),
    ],
)
def test_a_run_is_complete_when_its_last_step_is_evaluated_or_its_goal_is_reached(tmp_path, held_out, records, found):
    goal = {"eval/accuracy": 0.5} if held_out else {}
    config = run_config(tmp_path, data={"eval": held_out}, trainer={"steps": 4, "stop_at": goal})
    assert is_complete(config, records) == found


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path):
    writer = open_writer(tmp_path)
    for step in (1, 2):
        writer.write({"step": step})
        assert steps(tmp_path)[-1] == step


def test_resume_replaces_the_history_beyond_the_checkpoint(tmp_path):
    writer = open_writer(tmp_path)
    for step in range(6):
        writer.write({"step": step, "reward/mean": 1.0})
    resumed = open_writer(tmp_path, resume_step=3)
    assert steps(tmp_path) == [0, 1, 2, 3]
    resumed.write({"step": 4, "reward/mean": 2.0})
    assert [(r["step"], r["reward/mean"]) for r in read_metrics(RunFolder(tmp_path))][-2:] == [(3, 1.0), (4, 2.0)]
    assert list(tmp_path.glob("*.new")) == []


def test_a_new_run_starts_a_new_history(tmp_path):
    open_writer(tmp_path).write({"step": 0})
    open_writer(tmp_path)
    assert read_metrics(RunFolder(tmp_path)) == []


def test_a_torn_last_line_is_ignored_and_goes_at_the_next_resume(tmp_path):
    writer = open_writer(tmp_path)
    writer.write({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')
    assert steps(tmp_path) == [1]
    open_writer(tmp_path, resume_step=5).write({"step": 2})
    assert steps(tmp_path) == [1, 2]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(RunFolder(tmp_path / "nowhere")) == []


def test_tensorboard_gets_every_scalar_and_forgets_abandoned_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = open_writer(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        writer.write({"step": step, "time": 100.0 + step, "reward/mean": float(step)})
    writer.close()
    resumed = open_writer(tmp_path, tensorboard=True, resume_step=1)
    resumed.write({"step": 2, "time": 200.0, "reward/mean": 20.0})
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1.0), (2, 20.0)]


def test_wandb_is_only_asked_for_when_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_writer(tmp_path)
    with pytest.raises(DapoError, match="observe.wandb_project=mine needs the package wandb: pip install wandb"):
        open_writer(tmp_path, wandb_project="mine")


def test_wandb_gets_the_records_and_a_run_for_each_resume(tmp_path, monkeypatch):
    started, logged = [], []
    run = SimpleNamespace(log=lambda record, step: logged.append((step, record)), finish=lambda: logged.append("end"))
    wandb = SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step in (None, 4):
        writer = open_writer(tmp_path, wandb_project="mine", resume_step=resume_step)
        writer.write({"step": 5, "reward/mean": 1.0})
        writer.close()

    assert [options["name"] for options in started] == [tmp_path.name, f"{tmp_path.name}-from-4"]
    assert logged[:2] == [(5, {"step": 5, "reward/mean": 1.0}), "end"]
