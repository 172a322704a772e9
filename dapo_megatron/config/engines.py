"""The SGLang servers."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class EngineConfig(Section):
    replicas: int = Field(1, ge=1)
    """SGLang servers."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs (or processes) of one server."""
    context_length: int = Field(32768, ge=2)
    """Prompt plus response, in tokens."""
    max_running_requests: int = Field(256, ge=1)
    """Requests that one server decodes together."""
    max_total_tokens: int | None = Field(None, ge=1)
    """KV cache of one server in tokens; null lets SGLang decide (give it on CPU)."""
    mem_fraction: float = Field(0.85, gt=0, lt=1)
    """Share of device memory for weights and KV cache (--mem-fraction-static)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the engine's weights; null is model.dtype."""
    seed: int = Field(0, ge=0, lt=2**31)
    """SGLang's --random-seed of the first server; each further one has the next number."""
    deterministic: bool = False
    """Sample so that the same run gives the same tokens, bit for bit: every request has its own seed, one runs at a
    time, nothing is cached between them, graders are limited by CPU time. Slow: for tests and for hunting faults."""
    python: str | None = None
    """Python of the engine's virtual environment; null is this one."""
    extra_args: list[str] = []
    """Further arguments for sglang.launch_server."""
    call_timeout_s: float | None = Field(None, gt=0)
    """Seconds for one control call or one broadcast to an engine, and for it to load a push from the disk; null is half
    of trainer.collective_timeout_s, or launch.engine_timeout_s where that is less."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Seconds until a started server must answer, and controller and trainer ranks give their first sign of life."""
