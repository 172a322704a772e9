"""Pushing the trainer's weights to the engines."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class ReshardingConfig(Section):
    transport: Literal["broadcast", "disk"] = "broadcast"
    """How weights reach the engines: in collectives of senders and engines, or in files of the run folder, which must
    then have room for two versions and be there for every engine under the same path. disk is for engines that cannot
    join a group with the trainer: they have another NCCL, or stand in another network."""
    bucket_mib: int = Field(512, ge=1)
    """Size of one bucket, which is sent in one collective or is one file, in MiB."""
    in_flight: Literal["retract", "keep_kv"] = "retract"
    """What becomes of a response's keys and values when weights change under it: computed anew by the new weights, or
    kept, so that it goes on at once, its later tokens sampled by new weights over old keys and values (PipelineRL)."""
    verify_every: int = Field(1, ge=0)
    """Pushes between comparisons of trainer and engine; 0 is never."""
    verify_slack: float = Field(1.0, gt=0)
    """Multiplies what |log-prob differences| of trainer and engine may be: in float32 the largest 1e-4; where one of
    them is bfloat16 their mean 0.1 and their 99th percentile 0.5."""
    verify_prompts: int = Field(4, ge=1)
    """Fixed prompts that are sampled for it."""
    verify_tokens: int | None = Field(None, ge=1)
    """Tokens sampled after each of them, whose log-probs are compared; null is 4 in float32, else 64 (of 256 tokens a
    99th percentile says something), at most rollout.max_response_tokens."""
    verify_checksums: bool = True
    """Compare the engines' weights too, bit for bit; false where an engine does not keep them as they are sent
    (quantised, or packed for AMX)."""
