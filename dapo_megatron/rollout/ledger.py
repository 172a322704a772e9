"""The ledger knows the fate of every prompt that was issued, one line each in the run folder.

A line belongs to a rollout step, so a resumed run cuts the ledger back to its checkpoint and writes history anew. What
is left proves that no prompt was skipped or used twice (`check_exactly_once`):

    number   its lines, in their order
    17       carried, kept           settled by the last; every batch that leaves it over carries it again
    18       carried, stale          waits to be issued again, under its number
    19       all_wrong               settled
    20       unfinished, all_right   was issued again within the step, because the engines left it unfinished; settled
    21       issued                  is with the engines while a batch leaves; a resume from there issues it again
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Literal

import msgspec

from dapo_megatron.data.snapshot import Snapshot
from dapo_megatron.errors import DataError
from dapo_megatron.observe.jsonl import append_lines, cut_after, read_lines

Fate = Literal["kept", "carried", "all_right", "all_wrong", "stale", "issued", "unfinished"]
SETTLED: tuple[Fate, ...] = ("kept", "all_right", "all_wrong")
"""Nothing comes after these."""
SHOWN = 5
"""Most problems of one kind that are told."""


class Entry(msgspec.Struct):
    """What became of one issued prompt in one step."""

    step: int
    order: int
    prompt_id: str
    fate: Fate
    version: int
    """Oldest policy version that sampled a token of the group; -1: it is not finished."""


class Ledger:
    """Append-only file of entries."""

    def __init__(self, path: Path, *, cut_to_step: int | None = None):
        """Open the ledger; entries after `cut_to_step` are dropped (None starts a new one)."""
        self.path = path
        cut_after(path, cut_to_step)

    def settle(self, entries: Sequence[Entry]) -> Counter[Fate]:
        """Write down fates and count them."""
        append_lines(self.path, [msgspec.to_builtins(entry) for entry in entries], sync=True)
        return Counter(e.fate for e in entries)


def read_ledger(path: Path) -> list[Entry]:
    """All whole lines; a line torn by a kill is left out.

    Raises:
        DataError: a line that is no entry.
    """
    entries = []
    for number, row in enumerate(read_lines(path), start=1):
        try:
            entries.append(msgspec.convert(row, Entry))
        except msgspec.ValidationError as e:
            raise DataError(f"{path}, line {number}: no entry of a ledger ({e})") from None
    return entries


class LedgerAudit(msgspec.Struct):
    """What a ledger shows."""

    issued: int
    """Numbers issued, from 0."""
    settled: int
    waiting: list[int]
    """Numbers whose group is carried, stale or with the engines."""
    frontier: int
    """Every number below it is settled."""
    epochs: int
    """Finished epochs; 0 where the number of prompts is not known."""
    problems: list[str]
    """One line each; none: every number was settled exactly once, or waits."""


def check_exactly_once(entries: Sequence[Entry], prompts: int | None = None) -> LedgerAudit:
    """Look through a whole ledger.

    Args:
        prompts: in the data set; then each epoch is looked at too: no prompt twice, and every one in a finished epoch.
    """
    histories: dict[int, list[Entry]] = {}
    for entry in entries:
        histories.setdefault(entry.order, []).append(entry)
    issued = max(histories, default=-1) + 1
    lost = [order for order in range(issued) if order not in histories]
    settled = {order for order, lines in histories.items() if lines[-1].fate in SETTLED}
    problems = _first(f"number {order} was issued and is not in the ledger" for order in lost)
    last = max((entry.step for entry in entries), default=0)
    found = (_history_problem(order, histories[order], last) for order in sorted(histories))
    problems += _first(problem for problem in found if problem)
    epochs = 0
    if prompts is not None:
        epochs, others = _epochs({order: lines[0].prompt_id for order, lines in histories.items()}, settled, prompts)
        problems += others
    frontier = next((order for order in range(issued) if order not in settled), issued)
    waiting = sorted(histories.keys() - settled)
    return LedgerAudit(issued, len(settled), waiting, frontier, epochs, problems)


def check_snapshot(entries: Sequence[Entry], snapshot: Snapshot) -> list[str]:
    """What the controller's state in a checkpoint and the ledger up to its step tell differently, one line each.

    A number that waits is known to both: whoever goes on from the checkpoint will use it.
    """
    audit = check_exactly_once([entry for entry in entries if entry.step <= snapshot.step])
    where = f"the checkpoint of step {snapshot.step}"
    problems = []
    if audit.issued != snapshot.next_order:
        problems.append(f"{where} has {snapshot.next_order} numbers issued, the ledger {audit.issued}")
    known = {group.order for group in snapshot.carried} | {order for order, _ in snapshot.again}
    waiting = set(audit.waiting)
    problems += _first(f"number {order} waits, and {where} does not have it" for order in sorted(waiting - known))
    problems += _first(f"number {order} is settled, and waits in {where}" for order in sorted(known - waiting))
    return problems


def _history_problem(order: int, lines: Sequence[Entry], last: int) -> str | None:
    """`last` is the step of the ledger's last batch."""
    told = ", ".join(f"{e.fate} in step {e.step}" for e in lines)
    who = f"number {order} (prompt '{lines[0].prompt_id}')"
    if len(ids := {e.prompt_id for e in lines}) > 1:
        return f"number {order} is of {len(ids)} prompts: {', '.join(sorted(ids)[:SHOWN])}"
    if any(e.fate in SETTLED for e in lines[:-1]):
        return f"{who} was settled, and used again: {told}"
    before: Fate | None = None
    for entry in lines:
        if entry.fate == "stale" and before != "carried":
            return f"{who} went stale without having been carried: {told}"
        before = entry.fate
    if any(a.step > b.step for a, b in pairwise(lines)):
        return f"{who} has its steps in disorder: {told}"
    for entry, after in zip_longest(lines, lines[1:]):
        if entry.fate == "carried" and after is not None and after.fate not in ("carried", "kept", "stale"):
            return f"{who} was carried, and issued again though it was not stale: {told}"
        if entry.fate == "carried" and entry.step < last and (after is None or after.step != entry.step + 1):
            return f"{who} was carried out of step {entry.step}, and is missing from step {entry.step + 1}: {told}"
    return None


def _epochs(prompt_of: dict[int, str], settled: set[int], size: int) -> tuple[int, list[str]]:
    """(finished epochs, problems): the numbers of one epoch are size * e .. size * (e + 1) - 1."""
    seen: dict[int, Counter[str]] = {}
    for order, prompt_id in prompt_of.items():
        seen.setdefault(order // size, Counter())[prompt_id] += 1
    twice = [(e, p, n) for e in sorted(seen) for p, n in seen[e].items() if n > 1]
    problems = _first(f"prompt '{p}' was issued {n} times in epoch {e}" for e, p, n in twice)
    finished = [e for e in seen if all(order in settled for order in range(size * e, size * (e + 1)))]
    everyone = set().union(*(seen[e] for e in finished))
    for e in finished:
        problems += _first(f"prompt '{p}' is missing from epoch {e}" for p in sorted(everyone - seen[e].keys()))
    return len(finished), problems


def _first(problems: Iterable[str]) -> list[str]:
    found = list(problems)
    return found[:SHOWN] + ([f"... and {len(found) - SHOWN} more like it"] if len(found) > SHOWN else [])
