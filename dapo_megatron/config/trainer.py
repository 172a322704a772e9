"""The training loop: steps, checkpoints, deadlines."""

import math
from collections.abc import Mapping

from pydantic import Field

from dapo_megatron.config.base import EvaluationMetric, Section


class TrainerConfig(Section):
    steps: int = Field(100, ge=1, le=10**7)
    """Rollout steps."""
    mini_batch_prompts: int = Field(32, ge=1)
    """Groups in one optimizer update."""
    stop_at: dict[EvaluationMetric, float] = {}
    """The run ends before its last step when the evaluation has reached all of these: {eval/accuracy: 0.5}."""
    max_skipped_updates: int = Field(3, ge=0)
    """Updates with a non-finite gradient (skipped) in a row before the run stops."""
    batch_timeout_s: float = Field(7200.0, gt=0)
    """Seconds the trainer waits for the controller's next batch."""
    collective_timeout_s: float = Field(600.0, ge=1)
    """Seconds for one collective among the trainer's ranks: how soon a rank that hangs is noticed."""

    def goals_reached(self, evaluation: Mapping[str, float]) -> bool:
        """Whether an evaluation has reached every goal of `stop_at`; never without goals, or without an evaluation."""
        return bool(self.stop_at) and all(evaluation.get(k, -math.inf) >= v for k, v in self.stop_at.items())
