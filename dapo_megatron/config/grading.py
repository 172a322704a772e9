"""Who decides whether a response is right, and under which limits."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class GradingConfig(Section):
    grader: str = "dapo_megatron.grading.answers:grade"
    """package.module:function(text, truth) -> bool that decides whether a response is right."""
    workers: int = Field(2, ge=1)
    """Grading processes."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds of wall-clock and CPU time for one answer; beyond, the verdict is unknown."""
    memory_mib: int = Field(1024, ge=128)
    """Memory of one grading process in MiB."""
    unknown: Literal["wrong", "mask"] = "wrong"
    """How an answer without verdict is scored: as wrong, or masked out of the loss and of its group's statistics."""
