"""Who decides whether a response is right, and under which limits."""

from typing import Annotated, Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class GradingConfig(Section):
    grader: str | None = None
    """package.module:function(text, truth) -> bool that decides whether a response is right; null: the built-in one."""
    thinking: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=2, max_length=2)
    """Opening and closing tag of thoughts ([<think>, </think>]): only what follows the last closing one is graded."""
    workers: int = Field(2, ge=1)
    """Grading processes."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds of wall-clock and CPU time for one answer (engine.deterministic: CPU time alone); beyond, the verdict is
    unknown."""
    memory_mib: int = Field(1024, ge=128)
    """Memory of one grading process in MiB."""
    unknown: Literal["wrong", "mask"] = "wrong"
    """How an answer without verdict is scored: as wrong, or masked out of the loss and of its group's statistics."""
