"""What a run writes down for people."""

from pydantic import Field

from dapo_megatron.config.base import Section


class ObserveConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; null is off."""
    groups_per_step: int = Field(8, ge=0)
    """Groups of each step whose responses are kept for the report."""
    dump_batches: bool = False
    """Keep every training batch in the run folder, to replay it."""
