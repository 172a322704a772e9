"""Where training stands; goes into every checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Step and version are two numbers: a step may be finished before its weights are live, or pushed in parts."""

    step: int = 0
    """Finished rollout steps."""
    version: int = 0
    """Policy version that is live on the engines."""
    skipped: int = 0
    """Updates skipped in a row, up to now, for a non-finite gradient."""
