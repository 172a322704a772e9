"""Rows of both systems -> medians, time to accuracy, and the printed table. Pure but for the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

PHASES = ("generate", "old_logprobs", "update", "sync")
"""What both systems' rows time; the rest of a step is what is left over."""
LABELS = {
    "generate": "generation",
    "old_logprobs": "old log-probs",
    "update": "updates",
    "sync": "weight sync",
    "rest": "rest",
}
NOT_OF_THE_STEP = ("verify",)
"""What this project times inside a step and TRL's side does not do."""


@dataclass(frozen=True)
class Row:
    """One rollout step."""

    step: int
    seconds: float
    """Of the step without evaluation."""
    phases: dict[str, float]
    """Seconds of each of PHASES."""
    tokens: float
    """Response tokens generated and trained."""
    longest: float
    accuracy: float | None
    """Held-out, after the step, where it was evaluated."""


@dataclass(frozen=True)
class Run:
    """What one system did on one workload."""

    system: str
    startup: float
    """Seconds from the command to the first step, evaluation excluded."""
    accuracy_before: float | None
    rows: list[Row]


@dataclass(frozen=True)
class Summary:
    """Medians over the steps that count."""

    tokens_per_second: float
    seconds: float
    phases: dict[str, float]
    """Median seconds of each phase and of the rest."""
    tokens: float
    longest: float


def from_metrics(records: Sequence[dict], system: str, started: float) -> Run:
    """This project's run, from its records and the Unix time of the command."""
    first, *steps = records
    rows = []
    for r in steps:
        seconds = r["time/step"] - sum(r.get(f"time/{name}", 0.0) for name in NOT_OF_THE_STEP)
        phases = {name: r[f"time/{'push' if name == 'sync' else name}"] for name in PHASES}
        tokens, longest = r["rollout/response_tokens"], r["response/length_max"]
        rows.append(Row(r["step"], seconds, phases, tokens, longest, r.get("eval/accuracy")))
    # With a lag, evaluation is beside training, and its own time is another.
    startup = first["time"] - started - first.get("time/evaluate", first.get("eval/seconds", 0.0))
    return Run(system, startup, first.get("eval/accuracy"), rows)


def from_trl(records: Sequence[dict], system: str, started: float) -> Run:
    """TRL's run, from the lines of trl_worker.py and the Unix time of the command."""
    first, *steps = records
    rows = [
        Row(
            r["step"],
            r["seconds"],
            {name: r.get(name, 0.0) for name in PHASES},
            float(sum(r["lengths"])),
            float(max(r["lengths"])),
            r.get("accuracy"),
        )
        for r in steps
    ]
    return Run(system, first["time"] - started, first.get("accuracy"), rows)


def summarize(rows: Sequence[Row], skip: int) -> Summary:
    """Medians over the rows after the first `skip`.

    Raises:
        ValueError: nothing is left.
    """
    counted = rows[skip:]
    if not counted:
        raise ValueError(f"{len(rows)} steps, the first {skip} of them warm-up: none is left to measure")
    phases = {name: median(r.phases[name] for r in counted) for name in PHASES}
    phases["rest"] = median(r.seconds - sum(r.phases.values()) for r in counted)
    return Summary(
        tokens_per_second=median(r.tokens / r.seconds for r in counted),
        seconds=median(r.seconds for r in counted),
        phases=phases,
        tokens=median(r.tokens for r in counted),
        longest=median(r.longest for r in counted),
    )


def seconds_to(rows: Sequence[Row], target: float) -> float | None:
    """Training seconds until the first evaluation at or above `target`; None if there was none."""
    spent = 0.0
    for row in rows:
        spent += row.seconds
        if row.accuracy is not None and row.accuracy >= target:
            return spent
    return None


def table(title: str, ours: Sequence[Run], trl: Run, skip: int, target: float | None) -> Table:
    """All runs side by side; a ratio is above 1 where that run of this project is better than TRL's."""
    runs = (*ours, trl)
    found = [summarize(run.rows, skip) for run in runs]
    out = Table("", *(column for run in ours for column in (run.system, "ratio")), trl.system, title=title)
    out.title_justify = "left"
    for column in out.columns[1:]:
        column.justify = "right"
    rates = [s.tokens_per_second for s in found]
    out.add_row("response tokens trained a second", *_beside(rates, 0, [rate / rates[-1] for rate in rates]))
    out.add_row("seconds a step", *_times([s.seconds for s in found], 3))
    for name, label in LABELS.items():
        out.add_row(f"  {label}", *_beside([s.phases[name] for s in found], 3))
    out.add_row("response tokens a step", *_beside([s.tokens for s in found], 0))
    out.add_row("longest response of a step", *_beside([s.longest for s in found], 0))
    if target is not None:
        out.add_row(f"seconds to accuracy {target:.0%}", *_times([seconds_to(run.rows, target) for run in runs], 1))
        accuracies = [cell for run in ours for cell in (_before_after(run), "")]
        out.add_row("accuracy before and after", *accuracies, _before_after(trl))
    out.add_row("seconds to start", *_times([run.startup for run in runs], 1))
    return out


def _times(seconds: Sequence[float | None], digits: int) -> list[str]:
    return _beside(seconds, digits, [seconds[-1] / s if s and seconds[-1] else None for s in seconds])


def _beside(values: Sequence[float | None], digits: int, ratios: Sequence[float | None] | None = None) -> list[str]:
    """The cells of a row, each with its ratio but the last."""
    texts = ["not reached" if value is None else f"{value:.{digits}f}" for value in values]
    notes = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios or [None] * len(values)]
    return [cell for pair in zip(texts, notes, strict=True) for cell in pair][:-1]


def _before_after(run: Run) -> str:
    after = [r.accuracy for r in run.rows if r.accuracy is not None][-1:]
    return " -> ".join(f"{x:.1%}" for x in [run.accuracy_before, *after] if x is not None)
