"""What a long copy shows: a bar on a terminal, lines elsewhere."""

import io

from rich.console import Console

from dapo_megatron.observe import progress as module
from dapo_megatron.observe.progress import progress


def test_a_terminal_gets_a_bar_with_bytes_and_time():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress("converting", 4_000_000, console, done=1_000_000) as advance:
        advance(1_000_000)
        advance(2_000_000)
    shown = console.file.getvalue()
    assert "converting" in shown and "4.0/4.0 MB" in shown and "B/s" in shown and "0:00:00" in shown


def test_elsewhere_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO())
    with progress("converting", 8_000_000_000, console, done=2_000_000_000) as advance:
        for _ in range(6):
            now[0] += 2
            advance(1_000_000_000)
    assert console.file.getvalue().splitlines() == [
        "converting:  62%, 5.00 of 8.00 GB, 500 MB/s, 6 s left",
        "converting: 100%, 8.00 of 8.00 GB, 500 MB/s",
        "converting: 100%, 8.00 of 8.00 GB, 500 MB/s",
    ]
