"""How far a long copy is: a bar with bytes and time left on a terminal, now and then a line elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_S = 5.0


@contextmanager
def progress(what: str, total: int, console: Console, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told of every `bytes` more.

    Args:
        what: what is done, in a word or two.
        total: bytes.
        done: bytes that were there before.
    """
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda more: bar.advance(task, more)
        return
    lines = _Lines(what, total, console, done)
    yield lines.advance
    lines.show()


class _Lines:
    def __init__(self, what: str, total: int, console: Console, done: int):
        self.what, self.total, self.console, self.done, self.before = what, total, console, done, done
        self.start = self.shown = time.monotonic()

    def advance(self, more: int) -> None:
        self.done += more
        if time.monotonic() - self.shown >= LINE_EVERY_S:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        rate = (self.done - self.before) / max(self.shown - self.start, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
        share = f"{self.done / max(self.total, 1):4.0%}"
        text = f"{self.what}: {share}, {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s{left}"
        self.console.print(text, highlight=False, soft_wrap=True)
