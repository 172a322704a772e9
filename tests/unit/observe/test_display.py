import io
import time

from rich.console import Console

from dapo_megatron.observe.metrics import MetricsWriter
from dapo_megatron.observe.display import ProgressDisplay, sparkline, step_line
from dapo_megatron.process import Reporter
from dapo_megatron.run_folder import RunFolder

RECORD = {
    "version": 1,
    "reward/mean": 0.25,
    "reward/accuracy": 0.625,
    "response/length_mean": 321.0,
    "policy/entropy": 0.75,
    "groups/kept": 32.0,
    "groups/all_right": 5.0,
    "groups/all_wrong": 6.0,
    "groups/carried_in": 3.0,
    "speed/response_tokens_per_second": 1234.0,
    "time/step": 30.0,
    "time/generate": 20.0,
    "time/update": 10.0,
    "eval/accuracy": 0.5,
}


def writer(run_dir, resume_step=None):
    return MetricsWriter(RunFolder(run_dir), tensorboard=False, wandb_project=None, resume_step=resume_step)


def record(step):
    return {"step": step, "time": time.time()} | RECORD


def report(run_dir, process, phase, detail):
    with Reporter(RunFolder(run_dir), process) as reporter:
        reporter.phase(phase, detail)


def terminal():
    return Console(force_terminal=True, width=100, file=io.StringIO(), record=True)


def test_the_display_shows_what_matters(tmp_path):
    metrics = writer(tmp_path)
    metrics.write(record(1))
    # An evaluation is shown until the next one.
    metrics.write({k: v for k, v in record(2).items() if k != "eval/accuracy"})
    report(tmp_path, "controller", "generate", "groups 12/32")
    console = terminal()
    with ProgressDisplay(RunFolder(tmp_path), 10, console) as display:
        display.poll()
        console.print(display.render())

    text = console.export_text()
    for shown in ("step 2/10", "+0.250", "62.5%", "321 tokens", "0.750 nats", "50.0%", "1,234 tokens/s"):
        assert shown in text
    for shown in ("32 kept", "11 filtered", "3 carried", "generate 20.0 s", "update 10.0 s", "4 min 00 s left"):
        assert shown in text
    for shown in ("controller", "groups 12/32"):
        assert shown in text


def test_the_display_before_the_first_step_and_with_markup_in_a_status(tmp_path):
    report(tmp_path, "trainer-0", "start", "[bold]not markup[/x]")
    console = terminal()
    display = ProgressDisplay(RunFolder(tmp_path), 10, console)
    console.print(display.render())
    text = console.export_text()
    assert "step 0/10" in text and "first step" in text and "[bold]not markup[/x]" in text


def test_without_a_terminal_each_step_is_one_line_once(tmp_path):
    metrics = writer(tmp_path)
    metrics.write(record(1))
    output = io.StringIO()
    with ProgressDisplay(RunFolder(tmp_path), 10, Console(file=output, width=40)) as display:
        display.poll()
        assert output.getvalue() == ""  # history of an earlier start
        for step in (2, 3):
            metrics.write(record(step))
            display.poll()
            display.poll()
    lines = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/10", "step 3/10"]
    assert "accuracy 62.5%" in lines[0]


def test_steps_done_again_after_a_resume_are_shown_again(tmp_path):
    metrics = writer(tmp_path)
    output = io.StringIO()
    display = ProgressDisplay(RunFolder(tmp_path), 10, Console(file=output))
    for step in (1, 2, 3):
        metrics.write(record(step))
    display.poll()
    writer(tmp_path, resume_step=1).write(record(2))
    display.poll()
    assert [line.split("  ")[0] for line in output.getvalue().splitlines()] == [
        "step 1/10",
        "step 2/10",
        "step 3/10",
        "step 2/10",
    ]


def test_step_line_leaves_out_what_was_not_measured():
    assert step_line({"step": 0, "eval/accuracy": 0.25}, 60) == "step 0/60  eval 25.0%"
    assert step_line({"step": 1, "policy/entropy": float("nan")}, 60) == "step 1/60  entropy nan"


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan")]) == ""
    assert sparkline([*range(99), 7, 0], width=2) == "█▁" and len(sparkline(list(range(99)), width=10)) == 10
