"""The ledger knows the fate of every prompt that was issued, one line each in the run folder.

A line belongs to a rollout step, so a resumed run cuts the ledger back to its checkpoint and writes history anew.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec

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
        kept = [] if cut_to_step is None else [e for e in read_ledger(path) if e.step <= cut_to_step]
        aside = path.with_suffix(".partial")
        aside.write_bytes(b"".join(msgspec.json.encode(e) + b"\n" for e in kept))
        os.replace(aside, path)
        self._file = path.open("ab")

    def issue(self, order: int, prompt_id: str) -> None:
        """A prompt went out to the engines."""
        self.pending[order] = prompt_id

    def settle(self, entries: list[Entry]) -> Counter[Fate]:
        """Write down fates and count them."""
        for entry in entries:
            self.pending.pop(entry.order, None)
        self._file.write(b"".join(msgspec.json.encode(e) + b"\n" for e in entries))
        self._file.flush()
        return Counter(e.fate for e in entries)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(path: Path) -> list[Entry]:
    """All whole lines; a line torn by a kill is left out."""
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=Entry) for line in path.read_bytes().split(b"\n")[:-1]]
