"""Which checkpoints a run folder shows, by their names alone: nothing heavy is imported for it."""

import re
from pathlib import Path

from dapo_megatron.run_folder import RunFolder

PUBLISHED = re.compile(r"step_\d{6,}")


def published(folder: RunFolder) -> list[Path]:
    """Checkpoints by name, oldest first; what is in them is not looked at."""
    found = [p for p in folder.checkpoints.glob("step_*") if PUBLISHED.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a published checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))
