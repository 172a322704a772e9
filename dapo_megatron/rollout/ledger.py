"""The ledger knows the fate of every prompt that was issued, one line each in the run folder.

A line belongs to a rollout step, so a resumed run cuts the ledger back to its checkpoint and writes history anew.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from dapo_megatron.observe.jsonl import append_lines, cut_after, read_lines

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
    """Append-only file of entries."""

    def __init__(self, path: Path, *, cut_to_step: int | None = None):
        """Open the ledger; entries after `cut_to_step` are dropped (None starts a new one)."""
        self.path = path
        cut_after(path, cut_to_step)

    def settle(self, entries: Sequence[Entry]) -> Counter[Fate]:
        """Write down fates and count them."""
        append_lines(self.path, [msgspec.to_builtins(entry) for entry in entries])
        return Counter(e.fate for e in entries)


def read_ledger(path: Path) -> list[Entry]:
    """All whole lines; a line torn by a kill is left out."""
    return [msgspec.convert(row, Entry) for row in read_lines(path)]
