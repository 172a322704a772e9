"""What a job comes to: memory, a weight push, a checkpoint, a step; and why it cannot work, if it cannot. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from dapo_megatron.actor.memory import StageMemory, fullest, trainer_memory
from dapo_megatron.checkpoint.size import SaveBytes, save_bytes
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.resharding.engine_parts import check_engine_layout
from dapo_megatron.resharding.plan import plan_stages
from dapo_megatron.weights.families import ModelShape
from launch.engine_memory import EngineMemory, check_engine_memory, engine_memory
from launch.host_memory import GIB, Hosts, check_host_memory, host_memory
from launch.topology import Placement

RESERVE_GIB = 5.0
"""Of each trainer GPU for the CUDA context, NCCL's buffers, kernels' workspace and fragmentation."""


@dataclass(frozen=True)
class Cluster:
    """What only the person who asks knows of it."""

    gpu_gib: float
    """Memory of each GPU."""
    bandwidth_gbs: float
    """Gigabytes a second (10^9 bytes) of a broadcast from one trainer rank to all engines."""
    tokens_per_second: float | None
    """Response tokens that a job like this one was measured to train in a second; None: no time is told."""
    response_tokens: int | None
    """Mean length of a response; None: the longest."""


@dataclass(frozen=True)
class Push:
    """One push of the weights to all engines."""

    bytes: int
    buckets: int
    seconds: float
    """By broadcast: the pipeline stages send one after the other."""
    senders: tuple[int, ...]
    """Bytes that each stage's sender holds beside its weights."""
    engine: int
    """The same of a rank of an engine: a bucket."""


@dataclass(frozen=True)
class Plan:
    """All figures of a job."""

    config: RunConfig
    placement: Placement
    cluster: Cluster
    trainer: list[StageMemory]
    """Of every pipeline stage."""
    engine: EngineMemory
    push: Push
    save: SaveBytes
    hosts: list[Hosts]

    @property
    def step_seconds(self) -> float | None:
        """Of a rollout step, where tokens_per_second was given."""
        c, r = self.cluster, self.config.rollout
        if c.tokens_per_second is None:
            return None
        tokens = r.prompts_per_step * r.group_size * (c.response_tokens or r.max_response_tokens)
        return tokens / c.tokens_per_second


def make_plan(config: RunConfig, shape: ModelShape, placement: Placement, cluster: Cluster) -> Plan:
    """The figures of a job whose shape fits its layout (actor.layout_check)."""
    save, push, cpu = save_bytes(config, shape), _push(config, shape, cluster.bandwidth_gbs), placement.cpu
    trainer = trainer_memory(config, shape, fused=_is_fused(config, shape, placement))
    engine = engine_memory(config, shape, None if cpu else int(cluster.gpu_gib * GIB))
    of_ranks = [stage.peak if cpu else 0 for stage in trainer]
    of_process = engine.weights + engine.kv_cache + push.engine
    of_engine = of_process * config.engine.tensor_parallel_size if cpu else 0
    hosts = host_memory(config, placement, save, of_ranks, of_engine)
    return Plan(config, placement, cluster, trainer, engine, push, save, hosts)


def refusals(plan: Plan, shape: ModelShape) -> list[ConfigError]:
    """Every reason why the job cannot work, one line each."""
    found = [_refusal(check_engine_layout, shape, plan.config.engine.tensor_parallel_size)]
    found += [_refusal(check_host_memory, hosts) for hosts in plan.hosts]
    if not plan.placement.cpu:
        found += [
            _refusal(check_engine_memory, plan.config, plan.engine, plan.cluster.gpu_gib),
            _bucket_refusal(plan),
            _trainer_refusal(plan) or _sender_refusal(plan),
        ]
    return [error for error in found if error is not None]


def micro_batches(config: RunConfig, tokens: int) -> int:
    """Micro-batches of one data-parallel replica in one update, if every sequence has so many tokens."""
    responses = ceil(config.trainer.mini_batch_prompts * config.rollout.group_size / config.actor.data_parallel_size)
    return ceil(responses / max(1, config.actor.micro_batch_tokens // tokens))


def _is_fused(config: RunConfig, shape: ModelShape, placement: Placement) -> bool:
    """Whether the layers will be TransformerEngine's."""
    return not placement.cpu and config.actor.layer_spec != "torch" and not shape.family.post_norm


def _push(config: RunConfig, shape: ModelShape, bandwidth_gbs: float) -> Push:
    stages = plan_stages(
        shape,
        config.actor,
        dtype=config.model.dtype,
        engine_dtype=config.engine_dtype,
        bucket_bytes=config.resharding.bucket_mib << 20,
    )
    total, buckets = sum(stage.bytes for stage in stages), [b for stage in stages for b in stage.buckets]
    is_broadcast = config.resharding.transport == "broadcast"
    return Push(
        total,
        len(buckets),
        total / (bandwidth_gbs * 1e9),
        tuple(stage.sender_peak for stage in stages),
        max(b.bytes for b in buckets) if is_broadcast else 0,
    )


def _trainer_refusal(plan: Plan) -> ConfigError | None:
    most, gpu = fullest(plan.trainer), plan.cluster.gpu_gib
    if most.peak <= (gpu - RESERVE_GIB) * GIB:
        return None
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in most.parts.items())
    return ConfigError(
        f"pipeline stage {most.stage} of the trainer needs {most.peak / GIB:.1f} GiB a GPU ({parts}), GPUs of {gpu:g} "
        f"GiB have {gpu - RESERVE_GIB:g} for it: {_remedy(plan, most)}"
    )


def _bucket_refusal(plan: Plan) -> ConfigError | None:
    fraction, bucket = plan.config.engine.mem_fraction, plan.push.engine / GIB
    beside = plan.cluster.gpu_gib * (1 - fraction)
    if bucket <= beside:
        return None
    return ConfigError(
        f"the largest bucket of a push is {bucket:.1f} GiB, engine.mem_fraction={fraction:g} leaves {beside:.1f} of "
        f"an engine's GPU: lower resharding.bucket_mib={plan.config.resharding.bucket_mib} or engine.mem_fraction"
    )


def _sender_refusal(plan: Plan) -> ConfigError | None:
    gpu = plan.cluster.gpu_gib
    for stage, sender in zip(plan.trainer, plan.push.senders, strict=True):
        if stage.held + sender > (gpu - RESERVE_GIB) * GIB:
            return ConfigError(
                f"the sender of pipeline stage {stage.stage} needs {sender / GIB:.1f} GiB for a push beside "
                f"{stage.held / GIB:.1f}, GPUs of {gpu:g} GiB have {gpu - RESERVE_GIB:g} for both: lower "
                f"resharding.bucket_mib={plan.config.resharding.bucket_mib}"
            )
    return None


def _remedy(plan: Plan, most: StageMemory) -> str:
    if most.activations > most.held and not plan.config.actor.recompute:
        return "set actor.recompute=true"
    if most.activations > most.held:
        return "raise actor.tensor_model_parallel_size or actor.context_parallel_size"
    return "raise actor.tensor_model_parallel_size, pipeline_model_parallel_size or data_parallel_size"


def _refusal(check: Callable[..., None], *arguments: object) -> ConfigError | None:
    try:
        check(*arguments)
    except ConfigError as e:
        return e
    return None
