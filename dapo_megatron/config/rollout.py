"""How responses are sampled, for training and for evaluation."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.base import Section


class RolloutConfig(Section):
    prompts_per_step: int = Field(512, ge=1)
    """Groups trained on in one rollout step."""
    group_size: int = Field(16, ge=2)
    """Responses for each prompt (G)."""
    max_response_tokens: int = Field(20480, ge=1)
    """L_max: longest response in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the trainer divides its logits by it too."""
    max_policy_lag: int = Field(0, ge=0, le=8)
    """0: generate, then train (on-policy). N: generate all the time; no token that is trained is more than N policy
    versions old."""
    oversample_sigmas: float = Field(1.5, ge=0, le=6)
    """Margin of the groups issued for a step without a lag, in standard deviations of how many of them are kept; the
    surplus is carried into the next step."""
    function: str = "dapo_megatron.rollout.single_turn:rollout"
    """package.module:async function(prompt, engine) -> Response."""
    function_timeout_s: float = Field(7200.0, gt=0)
    """Seconds for one response of rollout.function, all its turns included, but not the waits of its requests for a
    slot. More than request_timeout_s: a request that takes its time does not end the run."""
    on_error: Literal["reissue", "stop"] = "reissue"
    """When rollout.function raises: call it again for the same sample, or end the run."""
    max_reissues: int = Field(3, ge=0)
    """Most times that a sample whose function raised, or a group that the engines did not finish, is issued again;
    then the run ends."""
    bank_bytes: int = Field(8 << 30, ge=0)
    """Bytes in the run folder for finished groups of the step in progress, which a resume takes back; 0: none are
    kept."""
    concurrency: int | None = Field(None, ge=1)
    """Most responses in flight on all engines together; null is engine.replicas x engine.max_running_requests."""
    request_timeout_s: float = Field(1800.0, gt=0)
    """Seconds for one request from the moment it has a slot, retries on other engines included; then its group is
    issued again."""


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Rollout steps between evaluations (one more at the start and at the end). With rollout.max_policy_lag, each goes
    on beside the next step."""
    samples: int = Field(32, ge=1)
    """k of avg@k: sampled responses a held-out prompt."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of the evaluation."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Nucleus of the evaluation's sampling."""
    greedy: bool = False
    """Also report greedy accuracy (temperature 0, one response a prompt)."""
