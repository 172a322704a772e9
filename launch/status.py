"""Where a run stands, and who waits for whom: `python -m launch.status RUN_DIR`.

Everything is read from the run's files (launch/look.py), so that it works on a login node.
"""

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from dapo_megatron.errors import DapoError
from dapo_megatron.observe.pace import clock
from dapo_megatron.run_folder import RunFolder
from launch.culprit import Condition, Verdict, judge
from launch.look import Process, Snapshot, look

NO_RUN = 3
CODES = {
    Condition.RUNNING: 0,
    Condition.FINISHED: 0,
    Condition.FAILED: 1,
    Condition.NOT_RUNNING: 4,
    Condition.HANGS: 5,
}
"""2 is a command line that cannot be read."""
EVERY_S = 2.0
STYLES = {
    Condition.RUNNING: "bold green",
    Condition.FINISHED: "bold green",
    Condition.FAILED: "bold red",
    Condition.NOT_RUNNING: "bold yellow",
    Condition.HANGS: "bold red",
}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="Exit code: 0 it runs, or has finished; 1 it failed; 2 the command line is wrong; 3 there is no run, or its "
    "files cannot be read; 4 it is not running: in the queue, or stopped; 5 it hangs."
)
def command(
    run_dir: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as one line of JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="On a terminal, show it until the run is over.")] = False,
) -> None:
    """Show where a run stands, and who waits for whom; works wherever its folder can be read."""
    folder, console = RunFolder(run_dir), Console(soft_wrap=True)
    seen = look(folder)
    verdict = judge(seen)
    if as_json:
        print(as_text(seen, verdict))
    elif watch and console.is_terminal:
        verdict = _watch(folder, console)
    else:
        console.print(rendered(seen, verdict))
    raise typer.Exit(CODES[verdict.condition])


def _watch(folder: RunFolder, console: Console) -> Verdict:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            seen = look(folder)
            verdict = judge(seen)
            live.update(rendered(seen, verdict), refresh=True)
            if verdict.condition not in (Condition.RUNNING, Condition.HANGS):
                return verdict
            time.sleep(EVERY_S)


def as_text(seen: Snapshot, verdict: Verdict) -> str:
    """All of it as one line of JSON; ages and durations are seconds, times Unix times."""
    return msgspec.json.encode({"verdict": verdict, "exit_code": CODES[verdict.condition], "run": seen}).decode()


def rendered(seen: Snapshot, verdict: Verdict) -> RenderableType:
    """All of it for a terminal."""
    head = Text.assemble((verdict.condition.value, STYLES[verdict.condition]), f"  {verdict.line}")
    parts = [head, Text(), *_aligned(_facts(seen)), Text(), *_processes(seen, verdict)]
    if seen.log:
        parts += [Text(), Text("logs/launcher.log", "dim"), *(Text(line) for line in seen.log)]
    return Group(*parts)


def _facts(seen: Snapshot) -> list[tuple[str, str]]:
    rows = [("run", seen.name)]
    if (start := seen.started) is not None:
        rows.append(("start", f"{seen.attempt}, at {_at(start.started)}, from step {start.step}"))
        if start.slurm_job is not None:
            ends = f", until {_at(start.ends)}" if start.ends is not None else ""
            rows.append(("SLURM", f"job {start.slurm_job}{ends}"))
    rows.append(("step", f"{seen.step} of {seen.total_steps}{_left(seen)}"))
    rows.append(("checkpoint", f"step {seen.saved.step}, {clock(seen.saved.age_s)} old" if seen.saved else "none yet"))
    if seen.push is not None:
        push = seen.push
        size = f"{push.bytes / 1e9:.3g} GB in {push.seconds:.1f} s"
        rows.append(("last push", f"version {push.version}, {size}, {clock(push.age_s)} ago"))
    groups = [p.detail for p in seen.processes if p.name == "controller" and p.phase == "generate" and p.detail]
    rows += [("groups", text) for text in groups]
    if seen.engines is not None:
        rows.append(("engines", f"generation {seen.engines.generation}, {clock(seen.engines_s)} old"))
        again = {m.name: f", started {m.start} times" if m.start > 1 else "" for m in seen.engines.members}
        rows += [("", f"{m.name} {m.url}{again[m.name]}") for m in seen.engines.members]
    return rows


def _left(seen: Snapshot) -> str:
    if seen.pace is None:
        return ""
    return f", {seen.pace.step_s:.1f} s a step, {clock(seen.pace.left_s)} left"


def _at(when: float) -> str:
    return datetime.fromtimestamp(when).astimezone().isoformat(sep=" ", timespec="seconds")


def _processes(seen: Snapshot, verdict: Verdict) -> list[Text]:
    shown, is_running = [*([seen.launcher] if seen.launcher else []), *seen.processes], seen.holder is not None
    rows = [(p.name, p.host, p.phase, clock(p.phase_s), _heartbeat(p, is_running=is_running), p.detail) for p in shown]
    lines = _aligned([("process", "host", "phase", "for", "heartbeat", "detail"), *rows])
    lines[0].stylize("dim")
    for process, line in zip(shown, lines[1:], strict=True):
        if process.name == verdict.culprit:
            line.stylize("bold yellow")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[Text]:
    """A line each, never broken: whoever reads a batch job's log has no terminal whose width would count."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        Text("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()) for row in rows
    ]


def _heartbeat(process: Process, *, is_running: bool) -> str:
    if process.exit is not None:
        return "ended" if process.exit.kind is None else f"failed ({process.exit.kind})"
    return f"{process.silence_s:.0f} s ago" if is_running else "none"


def main() -> None:
    """Entry point."""
    try:
        app()
    except (DapoError, OSError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(NO_RUN)


if __name__ == "__main__":
    main()
