"""Every option of a run, once: one typed tree, read from a YAML recipe and dotted overrides.

The text under a field is its documentation (`dapo-megatron config --explain` prints it). What needs the model's own
config (heads, layers, vocabulary against the layout) is checked by actor.fit.check_fit; everything else here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapo_megatron.errors import DapoError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Section):
    path: str
    """Hugging Face checkpoint folder (config.json, safetensors, tokenizer)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the trainer's parameters and activations (gradients and the optimizer are float32)."""


class AlgorithmConfig(Section):
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip: the ratio is clipped at 1 - clip_low."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip (Clip-Higher): the ratio is clipped at 1 + clip_high."""
    clip_dual: float | None = Field(None, gt=1)
    """Dual clip for negative advantages: loss at most clip_dual * |A|; null is off, as in the paper."""
    aggregation: Literal["token", "group_token", "sample"] = "token"
    """What the loss is a mean of: the tokens of the mini-batch, of each group, or of each response."""
    dynamic_sampling: bool = True
    """Train only on groups that are neither all right nor all wrong; false trains on every group."""
    max_generation_rounds: int = Field(10, ge=1)
    """Rounds of generation in one step before a search for mixed groups is given up with an error."""
    overlong_cache: int = Field(4096, ge=0)
    """L_cache in tokens: the soft punishment grows over the last overlong_cache tokens; 0 is off."""
    overlong_filtering: bool = False
    """Mask truncated responses out of the loss."""
    old_logprobs: Literal["actor", "rollout"] = "actor"
    """Where the ratio's denominator comes from: recomputed by the trainer, or the engine's own."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling: cap C on exp(old - rollout); null is off. Needs old_logprobs: actor."""
    shuffle_rewards: bool = False
    """Control experiment: permute the verdicts inside each group, so that nothing can be learned."""


class DataConfig(Section):
    train: str
    """Training prompts: a .jsonl or .parquet file or a Hugging Face dataset folder."""
    eval: str | None = None
    """Held-out prompts for the periodic evaluation; null switches it off."""
    prompt_field: str = "prompt"
    """Field with the question (dotted path; a list of chat messages is accepted)."""
    answer_field: str = "answer"
    """Field with the ground truth (dotted path)."""
    answer_pattern: str | None = None
    """Regular expression with one group that cuts the ground truth out of the field (GSM8K: '#### (.+)')."""
    template: str = "dapo"
    """Name of a ready template (dapo, boxed, plain) or a string with {prompt}; with boxed, only a box is an answer."""
    chat: bool = True
    """Wrap the prompt in the tokenizer's chat template."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest prompt in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a longer prompt: dropped and counted, or an error."""
    shuffle: bool = True
    """Shuffle the prompts anew every epoch (by run.seed)."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first eval_limit held-out prompts."""


class GradingConfig(Section):
    grader: str | None = None
    """package.module:function(text, truth) -> bool that decides whether a response is right; null: the built-in one."""
    thinking: tuple[str, str] | None = None
    """Opening and closing tag of thoughts ([<think>, </think>]): only what follows the last closing one is graded."""
    workers: int = Field(2, ge=1)
    """Grading processes."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds of wall-clock and CPU time for one answer; beyond, the verdict is unknown."""
    memory_mb: int = Field(1024, ge=128)
    """Memory of one grading process in MiB."""
    unknown: Literal["wrong", "mask"] = "wrong"
    """How an answer without verdict is scored: as wrong, or masked out of the loss and of its group's statistics."""


class RolloutConfig(Section):
    prompts_per_step: int = Field(512, ge=1)
    """Groups trained on in one rollout step."""
    group_size: int = Field(16, ge=2)
    """Responses for each prompt (G)."""
    max_response_tokens: int = Field(20480, ge=1)
    """L_max: longest response in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the trainer divides its logits by it too."""
    max_policy_lag: Literal[0, 1] = 0
    """0: generate, then train (on-policy). 1: generate the next step's groups while this one trains."""
    function: str = "dapo_megatron.rollout.single_turn:rollout"
    """package.module:async function(prompt, engine) -> Response."""
    concurrency: int = Field(1024, ge=1)
    """Most responses in flight on all engines together."""
    request_timeout_s: float = Field(1800.0, gt=0)
    """Seconds for one request from the moment it is sent, retries included."""


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
    seed: int = 0
    """SGLang's --random-seed."""
    python: str | None = None
    """Python of the engine's virtual environment; null is this one."""
    extra_args: list[str] = []
    """Further arguments for sglang.launch_server."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Seconds until a started server must answer."""


class ActorConfig(Section):
    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each layer (TP)."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Stages of layers (PP)."""
    virtual_pipeline_model_parallel_size: int = Field(1, ge=1)
    """Pieces of layers that each pipeline stage holds, interleaved (VPP); 1 is off."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share out the experts of a layer (EP), taken out of TP x CP x DP."""
    data_parallel_size: int = Field(1, ge=1)
    """Copies of the model that share each mini-batch (DP)."""
    sequence_parallel: bool = True
    """Split activations between layers along the sequence over TP (used where TP > 1)."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Token budget of one packed micro-batch, over its CP ranks together; a longer sequence stands alone."""
    loss_chunk_tokens: int = Field(256, ge=1)
    """As many logits exist at a time in the loss as so many tokens have."""
    recompute: bool = False
    """Recompute every layer's activations in backward."""
    layer_spec: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layer implementation; auto takes TransformerEngine where it can be imported."""

    @property
    def expert_tensor_parallel_size(self) -> int:
        """Ranks that share each expert's matrices (ETP): 1, but TP where the experts are not spread (EP 1).

        With EP 1 and any other ETP, megatron-core 0.16.1 leaves out the sum of the experts' gradients over TP.
        """
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size


class PrecisionConfig(Section):
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """FP8 recipe of the layers' matrix products (docs/gpu.md says what each needs); off is model.dtype."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """e4m3 everywhere, or hybrid: e5m2 for gradients; null is TransformerEngine's default for the recipe."""
    bf16_layers_at_start: int = Field(0, ge=0)
    """First layers that stay in bfloat16; not with delayed."""
    bf16_layers_at_end: int = Field(0, ge=0)
    """Last layers that stay in bfloat16; not with delayed."""
    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 (1 byte each) and gather them so over data parallelism; masters are float32."""

    @property
    def token_multiple(self) -> int:
        """Tokens on each tensor-parallel rank are a multiple of it (TransformerEngine's blocks)."""
        return {"off": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}[self.fp8]


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    """AdamW's learning rate after the warm-up."""
    warmup_steps: int = Field(20, ge=0)
    """Linear warm-up in rollout steps (times the updates of a step: the schedule counts updates)."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's second-moment decay."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_grad: float = Field(1.0, gt=0)
    """Global gradient norm clip."""


class TrainerConfig(Section):
    steps: int = Field(100, ge=1)
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
    collective_timeout_s: float = Field(600.0, gt=0)
    """Seconds for one collective among the trainer's ranks or with the engines."""


class ReshardingConfig(Section):
    bucket_mb: int = Field(512, ge=1)
    """Bytes sent in one collective, in MiB."""
    verify_every: int = Field(1, ge=0)
    """Pushes between comparisons of trainer and engine log-probs on fixed prompts; 0 is never."""
    verify_tolerance: float = Field(1e-4, gt=0)
    """Largest |log-prob difference| between trainer and engine (1e-4 suits float32, 0.1 bfloat16)."""
    verify_prompts: int = Field(4, ge=1)
    """Fixed prompts that are compared."""


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Rollout steps between evaluations (one more at the start and at the end)."""
    samples: int = Field(32, ge=1)
    """k of avg@k: sampled responses a held-out prompt."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of the evaluation."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Nucleus of the evaluation's sampling."""
    greedy: bool = False
    """Also report greedy accuracy (temperature 0, one response a prompt)."""


class ObserveConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; null is off."""
    responses_per_step: int = Field(8, ge=0)
    """Groups of each step whose responses are kept for the report."""
    dump_batches: bool = False
    """Keep every training batch in the run folder, to replay it."""


class RunConfig(Section):
    run_dir: str = "runs/dapo"
    """Folder of the run: logs, metrics, checkpoints, report."""
    seed: int = 0
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
    resharding: ReshardingConfig = ReshardingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    observe: ObserveConfig = ObserveConfig()

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
        a = self.actor
        return (
            a.tensor_model_parallel_size
            * a.pipeline_model_parallel_size
            * a.context_parallel_size
            * a.data_parallel_size
        )

    @property
    def engine_dtype(self) -> str:
        """Type of the engine's weights."""
        return self.engine.dtype or self.model.dtype

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
        ranks = self.world_size // a.pipeline_model_parallel_size
        if ranks % (a.expert_model_parallel_size * a.expert_tensor_parallel_size):
            raise ValueError(
                f"actor.expert_model_parallel_size={a.expert_model_parallel_size} must divide the {ranks} ranks of a "
                "pipeline stage (TP x CP x DP)"
            )
        if algo.importance_cap is not None and algo.old_logprobs == "rollout":
            raise ValueError("algorithm.importance_cap needs algorithm.old_logprobs=actor")
        if self.grading.thinking and not all(self.grading.thinking):
            raise ValueError("grading.thinking needs two tags that are not empty, such as [<think>, </think>]")
        if self.precision.fp8_param_gather and self.precision.fp8 == "off":
            raise ValueError("precision.fp8_param_gather needs an FP8 recipe: set precision.fp8")
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML recipe and apply `section.key=value` overrides (values are YAML).

    Raises:
        DapoError: unreadable file, unknown key (with the nearest name), wrong value or failed cross-check.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise DapoError(f"no recipe at {path}: give the path of a YAML file such as launch/recipes/demo.yaml") from None
    except yaml.YAMLError as e:
        raise DapoError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise DapoError(f"{path}: expected sections such as 'model:' at the top, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict, where: str) -> RunConfig:
    """Validate a tree of plain values; `where` names its origin in errors.

    Raises:
        DapoError: one line for the first mistake.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        raise DapoError(f"{where}: {_first_mistake(e)}") from None


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, type, documentation) of every option, in the order of this file."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += fields(kind, f"{prefix}{name}.")
        else:
            text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            rows.append((prefix + name, text, field.description or ""))
    return rows


def value_of(config: RunConfig, dotted: str) -> Any:
    """The value of one option by its dotted name."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _apply(tree: dict, override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise DapoError(f"override '{override}' is not of the form section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise DapoError(f"override '{override}': '{section}' is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DapoError(f"override '{override}': the value is not valid YAML") from None


def _first_mistake(e: ValidationError) -> str:
    error = min(e.errors(), key=lambda error: error["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names = [name for name, _, _ in fields()] + list(RunConfig.model_fields)
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
        return f"unknown option '{key}': did you mean '{near[0]}'?"
    if error["type"] == "missing":
        return f"option '{key}' is required"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"option '{key}': {error['msg']} (got {error['input']!r})"
