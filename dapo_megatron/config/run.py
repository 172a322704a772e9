"""The whole config of a run, what follows from it, and the checks that need more than one section.

What needs the model's own config (heads, layers, vocabulary against the layout) is checked by actor.layout_check.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dapo_megatron.config.actor import ActorConfig, OptimizerConfig, PrecisionConfig
from dapo_megatron.config.algorithm import AlgorithmConfig
from dapo_megatron.config.base import Section
from dapo_megatron.config.checkpoint import CheckpointConfig
from dapo_megatron.config.data import DataConfig
from dapo_megatron.config.deadlines import Deadlines
from dapo_megatron.config.engines import EngineConfig
from dapo_megatron.config.grading import GradingConfig
from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.config.model import ModelConfig
from dapo_megatron.config.observe import ObserveConfig
from dapo_megatron.config.resharding import ReshardingConfig
from dapo_megatron.config.rollout import EvaluationConfig, RolloutConfig
from dapo_megatron.config.trainer import TrainerConfig


class RunConfig(Section):
    run_dir: str = Field("runs/dapo", min_length=1)
    """Folder of the run: logs, metrics, checkpoints, report."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the data order, the mini-batches and the weights made here."""
    model: ModelConfig
    data: DataConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    grading: GradingConfig = GradingConfig()
    engine: EngineConfig = EngineConfig()
    actor: ActorConfig = ActorConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resharding: ReshardingConfig = ReshardingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    observe: ObserveConfig = ObserveConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in one rollout step."""
        return self.rollout.prompts_per_step // self.trainer.mini_batch_prompts

    @property
    def warmup_updates(self) -> int:
        """Optimizer updates over which the learning rate rises."""
        return self.optimizer.warmup_steps * self.updates_per_step

    @property
    def world_size(self) -> int:
        """Trainer ranks."""
        return self.actor.world_size

    @property
    def concurrency(self) -> int:
        """Most responses in flight on all engines together."""
        return self.rollout.concurrency or self.engine.replicas * self.engine.max_running_requests

    @property
    def engine_dtype(self) -> str:
        """Type of the engine's weights."""
        return self.engine.dtype or self.model.dtype

    @property
    def keeps_kv(self) -> bool:
        """Whether pushes leave keys and values of earlier weights on the engines."""
        return self.resharding.in_flight == "keep_kv"

    @property
    def coarser_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the trainer's and of the engines' weights."""
        return "bfloat16" if "bfloat16" in (self.model.dtype, self.engine_dtype) else "float32"

    @property
    def verify_tokens(self) -> int:
        """Tokens of each prompt of the verification."""
        wanted = self.resharding.verify_tokens or {"float32": 4, "bfloat16": 64}[self.coarser_dtype]
        return min(wanted, self.rollout.max_response_tokens)

    @property
    def deadlines(self) -> Deadlines:
        """Who waits how long."""
        return Deadlines.of(self.rollout, self.engine, self.trainer, self.checkpoint, self.launch)

    def derived(self) -> dict[str, int | str]:
        """Values that follow from the options, for `config --explain`."""
        r = self.rollout
        return {
            "responses a step": r.prompts_per_step * r.group_size,
            "responses a mini-batch": self.trainer.mini_batch_prompts * r.group_size,
            "updates a step": self.updates_per_step,
            "updates in the run": self.updates_per_step * self.trainer.steps,
            "warm-up updates": self.warmup_updates,
            "trainer ranks": self.world_size,
            "tokens a micro-batch": self.actor.micro_batch_tokens,
            "longest sequence in tokens": self.data.max_prompt_tokens + r.max_response_tokens,
            "soft length limit in tokens": r.max_response_tokens - self.algorithm.overlong_cache,
            "engine type": self.engine_dtype,
        }

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        r, d, t, algo = self.rollout, self.data, self.trainer, self.algorithm
        if algo.overlong_cache >= r.max_response_tokens:
            raise ValueError(
                f"algorithm.overlong_cache={algo.overlong_cache} must be less than "
                f"rollout.max_response_tokens={r.max_response_tokens}"
            )
        if d.max_prompt_tokens + r.max_response_tokens > self.engine.context_length:
            raise ValueError(
                f"data.max_prompt_tokens={d.max_prompt_tokens} + rollout.max_response_tokens={r.max_response_tokens} "
                f"exceed engine.context_length={self.engine.context_length}"
            )
        if r.prompts_per_step % t.mini_batch_prompts:
            raise ValueError(
                f"trainer.mini_batch_prompts={t.mini_batch_prompts} must divide "
                f"rollout.prompts_per_step={r.prompts_per_step}"
            )
        a = self.actor
        if a.virtual_pipeline_model_parallel_size > 1 and a.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"actor.virtual_pipeline_model_parallel_size={a.virtual_pipeline_model_parallel_size} needs "
                "actor.pipeline_model_parallel_size of at least 2"
            )
        if algo.importance_cap is not None and algo.old_logprobs == "rollout":
            raise ValueError("algorithm.importance_cap needs algorithm.old_logprobs=actor")
        _ = self.deadlines  # they are checked
        goals = {"trainer.stop_at": list(t.stop_at)} if t.stop_at else {}
        if self.checkpoint.keep_best:
            goals["checkpoint.keep_best"] = [self.checkpoint.best_metric]
            if self.checkpoint.every % self.evaluation.every:
                raise ValueError(
                    f"checkpoint.keep_best needs an evaluation at every checkpoint: make checkpoint.every="
                    f"{self.checkpoint.every} a multiple of evaluation.every={self.evaluation.every}"
                )
        for option, names in goals.items():
            if d.eval is None:
                raise ValueError(f"{option} needs held-out prompts: set data.eval")
            if "eval/greedy_accuracy" in names and not self.evaluation.greedy:
                raise ValueError(f"{option} names eval/greedy_accuracy: set evaluation.greedy=true")
        if self.engine.deterministic and (self.engine.replicas > 1 or r.max_policy_lag):
            raise ValueError("engine.deterministic needs engine.replicas=1 and rollout.max_policy_lag=0")
        if self.precision.fp8_param_gather and self.precision.fp8 == "off":
            raise ValueError("precision.fp8_param_gather needs an FP8 recipe: set precision.fp8")
        return self
