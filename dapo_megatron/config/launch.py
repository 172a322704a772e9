"""Starting and watching the processes of a run."""

from pydantic import Field

from dapo_megatron.config.base import Section


class LaunchConfig(Section):
    heartbeat_timeout_s: float | None = Field(None, ge=5)
    """Seconds without a sign of life after which a process is taken for hung; null is the smaller of 60 and
    trainer.collective_timeout_s."""
    stop_grace_s: float = Field(15.0, ge=0)
    """Seconds that SIGTERM or Ctrl-C leave for the step in progress to be finished and saved; a second one ends all."""
