"""How long a step takes, how long the rest of a run, and whether there is one. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.config import RunConfig
from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.metrics import Record

LAST_STEPS = 10


@dataclass(frozen=True)
class Pace:
    """Both in seconds."""

    step_s: float
    """Median of the last steps."""
    left_s: float
    """Until the last step is done, evaluations and checkpoints not counted."""


def pace(records: Sequence[Record], total_steps: int) -> Pace | None:
    """The pace of a run with these metrics; None before its first step is done."""
    seconds = [record[m.STEP_SECONDS] for record in records if m.STEP_SECONDS in record]
    if not seconds:
        return None
    step_s = statistics.median(seconds[-LAST_STEPS:])
    done = max(int(record[m.STEP]) for record in records)
    return Pace(step_s, step_s * max(total_steps - done, 0))


def is_complete(config: RunConfig, records: Sequence[Record]) -> bool:
    """Whether a run with these metrics has reached its goals, or done all its steps and evaluated the last."""
    last = records[-1] if records else {}
    is_evaluated = config.data.eval is None or m.EVAL_ACCURACY in last
    return config.trainer.goals_reached(last) or (is_evaluated and last.get(m.STEP, 0) >= config.trainer.steps)


def clock(seconds: float) -> str:
    """A duration for people: 2 h 05 min, 4 min 00 s, 12 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
