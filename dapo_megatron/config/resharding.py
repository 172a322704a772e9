"""Pushing the trainer's weights to the engines."""

from pydantic import Field

from dapo_megatron.config.base import Section


class ReshardingConfig(Section):
    bucket_mib: int = Field(512, ge=1)
    """Size of one bucket, which is sent in one collective, in MiB; so much is gathered in one, too."""
    verify_every: int = Field(1, ge=0)
    """Pushes between comparisons of trainer and engine; 0 is never."""
    verify_tolerance: float = Field(1e-4, gt=0)
    """Largest |log-prob difference| between trainer and engine (1e-4 suits float32, 0.1 bfloat16)."""
    verify_prompts: int = Field(4, ge=1)
    """Fixed prompts that are sampled for it."""
    verify_tokens: int = Field(4, ge=1)
    """Tokens sampled after each of them, whose log-probs are compared."""

    @property
    def bucket_bytes(self) -> int:
        """Size of one bucket."""
        return self.bucket_mib << 20
