"""What the launcher's log says of its decisions."""

import io
from contextlib import redirect_stdout
from datetime import datetime

import pytest

from dapo_megatron.run_folder import RunFolder
from launch.journal import Journal
from launch.states import (
    AskToStop,
    End,
    EndTraining,
    EngineLost,
    GraceOver,
    HostLost,
    Requeue,
    StartEngine,
    StartTraining,
    StopAsked,
    TrainingEnded,
    TrainingFailed,
)


def decided(folder, event, actions):
    """What has reached the screen; a SLURM job's is a file, to which Python writes whole blocks."""
    screen = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(screen)):
        Journal(folder).decided(event, actions)
        return screen.getvalue().decode()


def said(folder):
    return [line.partition(" ")[2] for line in folder.journal.read_text().splitlines()]


def test_a_line_has_its_time_and_zone(tmp_path):
    folder, before = RunFolder(tmp_path), datetime.now().astimezone().replace(microsecond=0)
    Journal(folder).note("the job is cancelled")
    Journal(folder).note("again")  # as after a requeue
    first, second = folder.journal.read_text().splitlines()
    time, _, text = first.partition(" ")
    assert text == "the job is cancelled" and second.endswith(" again")
    assert before <= datetime.fromisoformat(time) <= datetime.now().astimezone()


def test_what_leads_to_nothing_yet_is_in_the_log_too(tmp_path):
    folder = RunFolder(tmp_path)
    assert not decided(folder, HostLost("node2"), [])
    assert not decided(folder, StopAsked("SIGTERM: the job is cancelled or preempted", comes_back=False), [])
    assert not decided(folder, TrainingEnded(), [])
    assert said(folder) == ["node2 is lost", "SIGTERM: the job is cancelled or preempted"]


@pytest.mark.parametrize(
    ("event", "actions", "line"),
    [
        (EngineLost("engine-1", "it hangs\nsee its log"), [StartEngine("engine-1")], "it hangs -> start engine-1"),
        (TrainingFailed("crash", "rank 1 died"), [EndTraining()], "rank 1 died -> end controller and trainer"),
        (
            TrainingEnded(),
            [StartEngine("engine-0"), StartTraining()],
            "TrainingEnded -> start engine-0, start controller and trainer from the newest checkpoint",
        ),
        (StopAsked("SIGTERM", comes_back=False), [AskToStop()], "SIGTERM -> ask for a checkpoint and the end"),
        (
            HostLost("n1"),
            [EndTraining(), End("crash", "n1 is lost")],
            "n1 is lost -> end controller and trainer, the end (crash)",
        ),
        (GraceOver(), [End(None, "finished")], "the time for a stop is over -> the end"),
        (HostLost("n1"), [Requeue("", (), False)], "n1 is lost -> back into the queue"),
        (HostLost("n1"), [Requeue("", ("n1", "n2"), True)], "n1 is lost -> back into the queue without n1, n2"),
    ],
)
def test_a_decision_is_one_line_and_on_the_screen_at_once_but_for_an_end(tmp_path, event, actions, line):
    """An end is told by whoever asked for the run."""
    folder = RunFolder(tmp_path)
    assert decided(folder, event, actions) == ("" if isinstance(actions[-1], End) else f"{line}\n")
    assert said(folder) == [line]
