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


def from_metrics(records: Sequence[dict], started: float) -> Run:
    """This project's run, from its metrics.jsonl and the Unix time of the command."""
    first, *steps = records
    rows = []
    for r in steps:
        seconds = r["time/step"] - sum(r.get(f"time/{name}", 0.0) for name in NOT_OF_THE_STEP)
        phases = {name: r[f"time/{'push' if name == 'sync' else name}"] for name in PHASES}
        tokens, longest = r["rollout/response_tokens"], r["response/length_max"]
        rows.append(Row(r["step"], seconds, phases, tokens, longest, r.get("eval/accuracy")))
    startup = first["time"] - started - first.get("time/evaluate", 0.0)
    return Run("this project", startup, first.get("eval/accuracy"), rows)


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


def table(title: str, ours: Run, trl: Run, skip: int, target: float | None) -> Table:
    """Both systems side by side; the ratio is above 1 where this project is the better one."""
    out = Table("", ours.system, trl.system, "ratio", title=title, title_justify="left")
    for column in out.columns[1:]:
        column.justify = "right"
    a, b = summarize(ours.rows, skip), summarize(trl.rows, skip)
    speed = a.tokens_per_second, b.tokens_per_second
    out.add_row("response tokens trained a second", *(f"{x:.0f}" for x in speed), f"{speed[0] / speed[1]:.2f}")
    out.add_row("seconds a step", f"{a.seconds:.3f}", f"{b.seconds:.3f}", f"{b.seconds / a.seconds:.2f}")
    for name, label in LABELS.items():
        out.add_row(f"  {label}", f"{a.phases[name]:.3f}", f"{b.phases[name]:.3f}", "")
    out.add_row("response tokens a step", f"{a.tokens:.0f}", f"{b.tokens:.0f}", "")
    out.add_row("longest response of a step", f"{a.longest:.0f}", f"{b.longest:.0f}", "")
    if target is not None:
        out.add_row(f"seconds to accuracy {target:.0%}", *_to_target(seconds_to(ours.rows, target), trl, target))
        out.add_row("accuracy before and after", _before_after(ours), _before_after(trl), "")
    out.add_row("seconds to start", f"{ours.startup:.1f}", f"{trl.startup:.1f}", f"{trl.startup / ours.startup:.2f}")
    return out


def _to_target(ours: float | None, trl: Run, target: float) -> tuple[str, str, str]:
    theirs = seconds_to(trl.rows, target)
    ratio = f"{theirs / ours:.2f}" if ours and theirs else ""
    return tuple("not reached" if s is None else f"{s:.1f}" for s in (ours, theirs)) + (ratio,)


def _before_after(run: Run) -> str:
    after = [r.accuracy for r in run.rows if r.accuracy is not None][-1:]
    return " -> ".join(f"{x:.1%}" for x in [run.accuracy_before, *after] if x is not None)
