"""What becomes known of a step after its record."""

from dapo_megatron.observe.metrics import MetricsWriter, read_metrics
from dapo_megatron.run_folder import RunFolder


def writer(folder, resume_step=None):
    return MetricsWriter(folder, tensorboard=False, wandb_project=None, resume_step=resume_step)


def test_readers_see_one_record_a_step_and_a_resume_keeps_what_came_late(tmp_path):
    folder = RunFolder(tmp_path)
    w = writer(folder)
    for step in (0, 1, 2):
        w.write({"step": step, "time": 10.0 * step, "version": step, "reward/mean": 0.5})
        if step < 2:
            w.write({"step": step, "time": 10.0 * step + 9, "eval/accuracy": 0.1 * step})
    expected = [
        {"step": 0, "time": 9.0, "version": 0, "reward/mean": 0.5, "eval/accuracy": 0.0},
        {"step": 1, "time": 19.0, "version": 1, "reward/mean": 0.5, "eval/accuracy": 0.1},
        {"step": 2, "time": 20.0, "version": 2, "reward/mean": 0.5},
    ]
    assert read_metrics(folder) == expected
    writer(folder, resume_step=1).write({"step": 2, "time": 50.0, "version": 2})
    assert read_metrics(folder) == [*expected[:2], {"step": 2, "time": 50.0, "version": 2}]
