"""The training loop: steps, checkpoints, deadlines."""

from pydantic import Field

from dapo_megatron.config.base import Section


class TrainerConfig(Section):
    steps: int = Field(100, ge=1, le=10**7)
    """Rollout steps."""
    mini_batch_prompts: int = Field(32, ge=1)
    """Groups in one optimizer update."""
    checkpoint_every: int = Field(10, ge=1)
    """Rollout steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept in the run folder."""
    max_skipped_updates: int = Field(3, ge=0)
    """Updates with a non-finite gradient (skipped) in a row before the run stops."""
    batch_timeout_s: float = Field(7200.0, gt=0)
    """Seconds the trainer waits for the controller's next batch."""
    collective_timeout_s: float = Field(600.0, ge=1)
    """Seconds for one collective among the trainer's ranks: how soon a rank that hangs is noticed."""
