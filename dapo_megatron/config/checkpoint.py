"""Checkpoints: when they are written, in which format, and which are kept."""

from pydantic import Field

from dapo_megatron.config.base import EvaluationMetric, Section


class CheckpointConfig(Section):
    every: int = Field(10, ge=1)
    """Rollout steps between checkpoints; the last step is always saved."""
    asynchronous: bool = True
    """Write in the background: training waits for a copy of its state only."""
    reshardable_every: int = Field(10, ge=1)
    """Every n-th checkpoint (and the last one) is fully_reshardable: it can be resumed in any layout. The others are
    dp_reshardable, which needs no gather: another data-parallel size, the same other sizes."""
    timeout_s: float = Field(3600.0, gt=0)
    """Seconds for writing one checkpoint, however slow the disk."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of every n-th step are kept too."""
    keep_best: int = Field(0, ge=0)
    """Checkpoints kept for the best value of best_metric, of those whose step was evaluated."""
    best_metric: EvaluationMetric = "eval/accuracy"
    """Metric of the evaluation by which keep_best chooses; the larger the better."""
