"""What a person watches while a run goes on: a live display, drawn by the launcher from files others write.

Every process says what it is doing in status-<who>.json; the numbers come from metrics.jsonl. On a terminal the
display is redrawn in place; elsewhere (nohup, a batch job's log) there is one plain line a step.
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dapo_megatron.observe import metrics
from dapo_megatron.observe.metrics import Record, read_metrics

BLOCKS = "▁▂▃▄▅▆▇█"
PHASES = ("generate", "old_logprobs", "update", "push", "verify", "checkpoint", "evaluate")


def write_status(run_dir: str | Path, who: str, phase: str, detail: str = "") -> None:
    """Say what process `who` does now ("generate", "groups 12/32"); replaces its last status atomically."""
    path = Path(run_dir) / f"status-{who}.json"
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({"phase": phase, "detail": detail, "since": time.time()}))
    aside.replace(path)


class ProgressDisplay:
    """Live display of one run, without threads: inside its `with`, call `poll` a few times a second."""

    def __init__(self, run_dir: str | Path, total_steps: int, console: Console | None = None):
        self._run_dir, self._total_steps = Path(run_dir), total_steps
        self._console = console or Console()
        self._records: list[Record] = []
        self._seen: tuple[int, int, int] | None = None
        self._refresh()  # what an earlier start of the run wrote is history, not news
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def poll(self) -> None:
        """Read what changed and show it."""
        news = self._refresh()
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
            return
        for record in news:
            self._console.print(step_line(record, self._total_steps), highlight=False, soft_wrap=True)

    def render(self) -> Panel:
        """The display as it stands."""
        known = _latest(self._records)
        title = f"[bold]dapo_megatron[/] · {self._run_dir.name}"
        parts = [self._bar(known), Text(), _numbers(known, self._records), Text(), _phase_times(known)]
        parts += [Text(), self._statuses()]
        return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(1, 2))

    def _refresh(self) -> list[Record]:
        """Read the records again if the file changed; returns the new ones (a resume takes some back)."""
        path = self._run_dir / metrics.FILE
        if not path.exists():
            return []
        stat = path.stat()
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen == self._seen:
            return []
        old, self._records, self._seen = self._records, read_metrics(self._run_dir), seen
        shared = 0
        for before, now in zip(old, self._records, strict=False):
            if (before["step"], before.get("time")) != (now["step"], now.get("time")):
                break
            shared += 1
        return self._records[shared:]

    def _bar(self, known: Record) -> Table:
        done = int(known.get("step", 0))
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self._total_steps, completed=done, complete_style="cyan", finished_style="green")
        row.add_row(f"[bold]step {done}[/]/{self._total_steps}", bar, self._time_left(done))
        return row

    def _time_left(self, done: int) -> str:
        seconds = [record["time/step"] for record in self._records if "time/step" in record]
        if not seconds:
            return "[dim]first step[/]"
        left = statistics.median(seconds[-10:]) * max(self._total_steps - done, 0)
        return f"{statistics.median(seconds[-10:]):.1f} s a step · [bold]{_clock(left)}[/] left"

    def _statuses(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for path in sorted(self._run_dir.glob("status-*.json")):
            status = json.loads(path.read_text())
            age = _clock(max(time.time() - status["since"], 0))
            who = path.stem.removeprefix("status-")
            grid.add_row(Text(who, "bold"), Text(status["phase"], "cyan"), Text(status["detail"]), Text(age, "dim"))
        return grid


def step_line(record: Record, total_steps: int) -> str:
    """One step as one line of plain text; what was not measured is left out."""
    parts = [f"step {record['step']:.0f}/{total_steps}"]
    for label, name, form in (
        ("reward", "reward/mean", "{:+.3f}"),
        ("accuracy", "reward/accuracy", "{:.1%}"),
        ("length", "response/length_mean", "{:.0f}"),
        ("entropy", "policy/entropy", "{:.3f}"),
        ("kept", "groups/kept", "{:.0f}"),
        ("grad norm", "optimizer/grad_norm", "{:.3f}"),
        ("tokens/s", "speed/response_tokens_per_second", "{:.0f}"),
        ("seconds", "time/step", "{:.1f}"),
        ("eval", "eval/accuracy", "{:.1%}"),
        ("eval greedy", "eval/greedy_accuracy", "{:.1%}"),
    ):
        if name in record:
            parts.append(f"{label} {form.format(record[name])}")
    return "  ".join(parts)


def sparkline(values: list[float], width: int = 24) -> str:
    """The last `width` finite values as block characters, scaled from their minimum to their maximum."""
    values = [value for value in values if math.isfinite(value)][-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in values)


def _latest(records: list[Record]) -> Record:
    """The newest value of every metric: an evaluation is shown until the next one."""
    known: Record = {}
    for record in records[-200:]:
        known |= record
    return known


def _numbers(known: Record, records: list[Record]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, name, form in (
        ("reward", "reward/mean", "{:+.3f}"),
        ("accuracy", "reward/accuracy", "{:.1%}"),
        ("response length", "response/length_mean", "{:.0f} tokens"),
        ("entropy", "policy/entropy", "{:.3f} nats"),
        ("eval accuracy", "eval/accuracy", "{:.1%}"),
        ("eval greedy", "eval/greedy_accuracy", "{:.1%}"),
        ("speed", "speed/response_tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if name in known:
            history = sparkline([record[name] for record in records if name in record])
            grid.add_row(f"[dim]{label}[/]", f"[bold]{form.format(known[name])}[/]", f"[cyan]{history}[/]")
    grid.add_row("[dim]groups[/]", _groups(known))
    return grid


def _groups(known: Record) -> str:
    filtered = known.get("groups/all_right", 0) + known.get("groups/all_wrong", 0)
    kept, carried = known.get("groups/kept", 0), known.get("groups/carried_in", 0)
    return f"[green]{kept:.0f} kept[/] · {filtered:.0f} filtered · {carried:.0f} carried"


def _phase_times(known: Record) -> Text:
    times = [(name, known[f"time/{name}"]) for name in PHASES if f"time/{name}" in known]
    parts = [f"[dim]{name}[/] {seconds:.1f} s" for name, seconds in times]
    return Text.from_markup("  ".join(parts) or "[dim]waiting for the first step[/]")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
