"""What a person watches while a run goes on: a live display, drawn by the launcher from files others write.

Every process says what it is doing in the run folder; the numbers come from its metrics. On a terminal the
display is redrawn in place; elsewhere (nohup, a batch job's log) there is one plain line a step.
"""

import math
import time
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.metrics import Record, read_metrics
from dapo_megatron.observe.pace import clock, pace
from dapo_megatron.process import read_statuses
from dapo_megatron.run_folder import RunFolder

BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = ("controller", "trainer-0")
"""Processes whose phase is shown: the trainer's other ranks do what the first one does."""


class ProgressDisplay:
    """Live display of one run, without threads: inside its `with`, call `poll` a few times a second."""

    def __init__(self, folder: RunFolder, total_steps: int, console: Console | None = None):
        self._folder, self._total_steps = folder, total_steps
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
        title = f"[bold]dapo_megatron[/] · {self._folder.name}"
        parts: list[RenderableType] = [
            self._bar(known),
            Text(),
            _numbers(known, self._records),
            Text(),
            _phase_times(known),
        ]
        parts += [Text(), self._statuses()]
        return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", padding=(1, 2))

    def _refresh(self) -> list[Record]:
        """Read the records again if the file changed; returns the new ones (a resume takes some back)."""
        path = self._folder.metrics
        if not path.exists():
            return []
        stat = path.stat()
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if seen == self._seen:
            return []
        old, self._records, self._seen = self._records, read_metrics(self._folder), seen
        shared = 0
        for before, now in zip(old, self._records, strict=False):
            if (before["step"], before.get("time")) != (now["step"], now.get("time")):
                break
            shared += 1
        return self._records[shared:]

    def _bar(self, known: Record) -> Table:
        done = int(known.get(m.STEP, 0))
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self._total_steps, completed=done, complete_style="cyan", finished_style="green")
        row.add_row(f"[bold]step {done}[/]/{self._total_steps}", bar, self._time_left())
        return row

    def _time_left(self) -> str:
        known = pace(self._records, self._total_steps)
        if known is None:
            return "[dim]first step[/]"
        return f"{known.step_s:.1f} s a step · [bold]{clock(known.left_s)}[/] left"

    def _statuses(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for s in read_statuses(self._folder):
            age = clock(max(time.time() - s.since, 0))
            if s.process in SHOWN:
                grid.add_row(Text(s.process, "bold"), Text(s.phase, "cyan"), Text(s.detail), Text(age, "dim"))
        return grid


def step_line(record: Record, total_steps: int) -> str:
    """One step as one line of plain text; what was not measured is left out."""
    parts = [f"step {record['step']:.0f}/{total_steps}"]
    for label, name, form in (
        ("reward", m.REWARD, "{:+.3f}"),
        ("accuracy", m.ACCURACY, "{:.1%}"),
        ("length", m.LENGTH_MEAN, "{:.0f}"),
        ("entropy", m.ENTROPY, "{:.3f}"),
        ("kept", m.GROUPS_KEPT, "{:.0f}"),
        ("grad norm", m.GRAD_NORM, "{:.3f}"),
        ("tokens/s", m.GENERATED_PER_SECOND, "{:.0f}"),
        ("seconds", m.STEP_SECONDS, "{:.1f}"),
        ("eval", m.EVAL_ACCURACY, "{:.1%}"),
        ("eval greedy", m.EVAL_GREEDY_ACCURACY, "{:.1%}"),
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
        ("reward", m.REWARD, "{:+.3f}"),
        ("accuracy", m.ACCURACY, "{:.1%}"),
        ("response length", m.LENGTH_MEAN, "{:.0f} tokens"),
        ("entropy", m.ENTROPY, "{:.3f} nats"),
        ("eval accuracy", m.EVAL_ACCURACY, "{:.1%}"),
        ("eval greedy", m.EVAL_GREEDY_ACCURACY, "{:.1%}"),
        ("speed", m.GENERATED_PER_SECOND, "{:,.0f} tokens/s"),
    ):
        if name in known:
            history = sparkline([record[name] for record in records if name in record])
            grid.add_row(f"[dim]{label}[/]", f"[bold]{form.format(known[name])}[/]", f"[cyan]{history}[/]")
    grid.add_row("[dim]groups[/]", _groups(known))
    return grid


def _groups(known: Record) -> str:
    filtered = known.get(m.GROUPS_ALL_RIGHT, 0) + known.get(m.GROUPS_ALL_WRONG, 0)
    kept, carried = known.get(m.GROUPS_KEPT, 0), known.get(m.GROUPS_CARRIED_IN, 0)
    return f"[green]{kept:.0f} kept[/] · {filtered:.0f} filtered · {carried:.0f} carried"


def _phase_times(known: Record) -> Text:
    times = [(phase, known[m.time_of(phase)]) for phase in m.PHASES if m.time_of(phase) in known]
    parts = [f"[dim]{name}[/] {seconds:.1f} s" for name, seconds in times]
    return Text.from_markup("  ".join(parts) or "[dim]waiting for the first step[/]")
