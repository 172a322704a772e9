"""The ledger knows the fate of every prompt that was issued, one line each in the run folder.

A line belongs to a rollout step, so a resumed run cuts the ledger back to its checkpoint and writes history anew.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec

from dapo_megatron.observe.jsonl import append_line, cut_after, read_lines

Fate = Literal["kept", "carried", "all_right", "all_wrong", "stale"]


class Entry(msgspec.Struct):
    """What became of one issued prompt in one step."""

    step: int
    order: int
    prompt_id: str
    fate: Fate
    version: int
    """Oldest policy version that sampled a token of the group."""


class Ledger:
    """Append-only file of entries; `pending` are the prompts issued and not yet told."""

    def __init__(self, path: Path, *, cut_to_step: int | None = None):
        """Open the ledger; entries after `cut_to_step` are dropped (None starts a new one)."""
        self.path = path
        self.pending: dict[int, str] = {}
        cut_after(path, cut_to_step)

    def issue(self, order: int, prompt_id: str) -> None:
        """A prompt went out to the engines."""
        self.pending[order] = prompt_id

    def settle(self, entries: list[Entry]) -> Counter[Fate]:
        """Write down fates and count them."""
        for entry in entries:
            self.pending.pop(entry.order, None)
            append_line(self.path, msgspec.to_builtins(entry))
        return Counter(e.fate for e in entries)


def read_ledger(path: Path) -> list[Entry]:
    """All whole lines; a line torn by a kill is left out."""
    return [msgspec.convert(row, Entry) for row in read_lines(path)]
