"""One weight push before it happens: a function of trainer layout, engine layout and model. Pure.

stage by stage      every rank of the stage's first replica gives its shards to the sender, a few at a time
                    the sender fills a bucket with whole tensors in the engines' type, and broadcasts it while it fills
                    the next one
                    every rank of every engine receives every bucket once, and keeps its part of each tensor

The push itself cuts its buckets by `plan_buckets`; what it sends is what `plan_push` names, tensor by tensor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from dapo_megatron.config import ActorConfig, EngineConfig
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.resharding.engine_parts import check_engine_layout, kept_bytes
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.stages import expert_copies, gathered_together, stage_mappings
from dapo_megatron.weights.table import ParameterMapping, hf_shapes, parameter_mappings

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
GATHER_BYTES = 16 << 20
"""Of shards that one collective brings to the sender; a larger parameter comes alone. Over gloo pushes with 8 or 32 MiB
took longer, and much longer with 64 MiB, a whole bucket."""
Tensor = tuple[str, tuple[int, ...]]
"""Name and shape."""


@dataclass(frozen=True)
class Bucket:
    """Whole Hugging Face tensors that travel in one collective, one behind the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size on the wire."""
        return sum(prod(s) for s in self.shapes) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"bucket {self.names[0]} .. {self.names[-1]} ({self.bytes} bytes)"


@dataclass(frozen=True)
class Gather:
    """One Megatron parameter, or those of several experts that stand at one place on their ranks."""

    mappings: tuple[ParameterMapping, ...]
    """One, or an expert's of each expert-parallel rank."""
    ranks: int
    """That give a shard: tensor-parallel ones, for experts times expert-parallel ones."""
    shard_bytes: int
    """Of each of them, in the trainer's type."""
    tensors: tuple[Tensor, ...]
    """What the sender makes of the shards, in order."""


@dataclass(frozen=True)
class StagePlan:
    """What one pipeline stage does."""

    gathers: tuple[Gather, ...]
    buckets: tuple[Bucket, ...]
    sender_peak: int
    """Bytes that the sender holds at most beside its own weights, padding of one parameter aside."""

    @property
    def bytes(self) -> int:
        """Broadcast by the stage's sender; received by every rank of every engine."""
        return sum(bucket.bytes for bucket in self.buckets)

    @property
    def gathered(self) -> int:
        """Bytes of shards that travel from other ranks to the stage's sender."""
        return sum(g.shard_bytes * (g.ranks - 1) for g in self.gathers)

    def contributed(self, *, experts: bool) -> int:
        """Bytes that each rank of the first replica gives to the sender, of its experts' parameters or of the others.

        The sender's own shards are counted too; they do not travel.
        """
        return sum(g.shard_bytes for g in self.gathers if (g.mappings[0].expert is not None) == experts)


@dataclass(frozen=True)
class Link:
    """From a stage's sender to an engine."""

    stage: int
    engine: int
    ranks: range
    """Of the stage's weight group, whose rank 0 is the sender: the engine's, in order."""
    bytes: int
    """That each of these ranks receives."""


@dataclass(frozen=True)
class PushPlan:
    """One push to all engines."""

    stages: tuple[StagePlan, ...]
    links: tuple[Link, ...]
    kept: tuple[int, ...]
    """Bytes of its parts, by rank of an engine."""
    engine_peak: int
    """Bytes that each rank of an engine holds at most beside its weights: the largest bucket."""

    @property
    def bytes(self) -> int:
        """Broadcast in all: what sync/bytes counts."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def gathered(self) -> int:
        """Bytes of shards that travel from other ranks to the senders."""
        return sum(stage.gathered for stage in self.stages)

    def seconds(self, network: float, inside_nodes: float) -> float:
        """How long it takes at least: stage by stage, the gather of a bucket beside the broadcast of the one before.

        Args:
            network: bytes per second of a broadcast, whatever the number of engines.
            inside_nodes: bytes per second that a sender gathers.
        """
        return sum(max(stage.bytes / network, stage.gathered / inside_nodes) for stage in self.stages)


def plan_push(
    shape: ModelShape, actor: ActorConfig, engine: EngineConfig, *, dtype: str, engine_dtype: str, bucket_bytes: int
) -> PushPlan:
    """Plan the push of a model from a trainer's layout (that fits the model: actor.layout_check) to engines.

    Args:
        dtype, engine_dtype: of the trainer's and of the engines' weights.

    Raises:
        ConfigError: an engine cannot share the model's tensors among its ranks.
    """
    check_engine_layout(shape, engine.tensor_parallel_size)
    stages = plan_stages(shape, actor, dtype=dtype, engine_dtype=engine_dtype, bucket_bytes=bucket_bytes)
    size = engine.tensor_parallel_size
    links = [
        Link(stage, e, range(1 + e * size, 1 + (e + 1) * size), plan.bytes)
        for stage, plan in enumerate(stages)
        for e in range(engine.replicas)
    ]
    rules = [mapping for mappings in _of_stages(shape, actor) for mapping in mappings]
    item = ITEM_BYTES[engine_dtype]
    return PushPlan(
        stages=stages,
        links=tuple(links),
        kept=tuple(sum(kept_bytes(rule, shape, size, rank, item) for rule in rules) for rank in range(size)),
        engine_peak=max(bucket.bytes for plan in stages for bucket in plan.buckets),
    )


def plan_stages(
    shape: ModelShape, actor: ActorConfig, *, dtype: str, engine_dtype: str, bucket_bytes: int
) -> tuple[StagePlan, ...]:
    """What each pipeline stage does, whatever the engines' layout."""
    stages = []
    for mappings in _of_stages(shape, actor):
        gathers = _gathers(shape, actor, mappings, ITEM_BYTES[dtype])
        buckets = plan_buckets((t for g in gathers for t in g.tensors), engine_dtype, bucket_bytes)
        stages.append(StagePlan(gathers, tuple(buckets), _sender_peak(shape, gathers, buckets, ITEM_BYTES[dtype])))
    return tuple(stages)


def plan_buckets(tensors: Iterable[Tensor], dtype: str, bucket_bytes: int) -> list[Bucket]:
    """Cut a sequence of (name, shape) into buckets of at most bucket_bytes; a larger tensor stands alone.

    The order is kept, so that the sender never holds more than two buckets and what was gathered last.
    """
    buckets: list[Bucket] = []
    current: list[Tensor] = []
    size = 0
    for name, shape in tensors:
        n = prod(shape) * ITEM_BYTES[dtype]
        if current and size + n > bucket_bytes:
            buckets.append(_bucket(current, dtype))
            current, size = [], 0
        current.append((name, shape))
        size += n
    if current:
        buckets.append(_bucket(current, dtype))
    return buckets


def _of_stages(shape: ModelShape, actor: ActorConfig) -> list[list[ParameterMapping]]:
    return stage_mappings(shape, actor.pipeline_model_parallel_size, actor.virtual_pipeline_model_parallel_size)


def _bucket(tensors: list[Tensor], dtype: str) -> Bucket:
    return Bucket(tuple(name for name, _ in tensors), tuple(shape for _, shape in tensors), dtype)


def _gathers(
    shape: ModelShape, actor: ActorConfig, mappings: Sequence[ParameterMapping], item_bytes: int
) -> tuple[Gather, ...]:
    """In the order of the export: of experts, those of the first expert-parallel rank bring the others."""
    table = parameter_mappings(shape)
    ep = actor.expert_model_parallel_size
    first = shape.experts.count // ep if shape.experts else 0
    out = []
    for mapping in mappings:
        if mapping.expert is None:
            tp, copies = actor.tensor_model_parallel_size, [mapping]
        elif mapping.expert < first:
            tp, copies = expert_tensor_parallel_size(actor), expert_copies(mapping, shape, table, ep)
        else:
            continue
        tensors = [t for copy in copies for t in zip(copy.hf, hf_shapes(copy, shape), strict=True)]
        shard = shard_numel(mapping, shape, tp) * item_bytes
        out.append(Gather(tuple(copies), tp * len(copies), shard, tuple(tensors)))
    return tuple(out)


def shard_numel(mapping: ParameterMapping, shape: ModelShape, tp_size: int) -> int:
    """Elements of one rank's slice of a parameter, rows that pad the vocabulary included."""
    if mapping.kind == "rows":
        return shape.padded_vocab(tp_size) // tp_size * shape.hidden
    whole = sum(map(prod, hf_shapes(mapping, shape)))
    return whole if mapping.kind == "whole" else whole // tp_size


def _sender_peak(shape: ModelShape, gathers: Sequence[Gather], buckets: Sequence[Bucket], item_bytes: int) -> int:
    """While a bucket is filled: it, the one before, which is under way, the shards gathered last (of the sender's own a
    copy, where they are of several parameters), and what is made of one parameter's."""
    sized = ((g, g.mappings[0].expert is None, g.shard_bytes * g.ranks) for g in gathers)
    peak, before, filled, left = 0, 0, 0, iter(buckets)
    names: list[str] = []
    for together in gathered_together(sized, GATHER_BYTES):
        copied = sum(g.shard_bytes for g in together if g.ranks > 1) if len(together) > 1 else 0
        shards = sum(g.shard_bytes * (g.ranks - 1) for g in together) + copied
        for gather in together:
            for i in range(len(gather.tensors)):
                if not names:
                    bucket = next(left)
                    names, before, filled = list(bucket.names), filled, bucket.bytes
                names.pop()
                made = item_bytes * _made(shape, gather, i)
                peak = max(peak, before + filled + shards + made)
    return peak


def _made(shape: ModelShape, gather: Gather, i: int) -> int:
    """Elements that weights.table.from_shards adds to the shards (a single one is taken as it is) when it makes, or
    still holds, tensor i."""
    kind, whole = gather.mappings[0].kind, gather.ranks == len(gather.mappings)
    each = len(gather.tensors) // len(gather.mappings)  # of one expert; the next one's are not made yet
    own = _numel(gather.tensors[i // each * each :][:each])
    joined = 0 if whole or kind == "whole" else own
    taken_apart = own if kind == "qkv" and shape.kv_heads > 1 else 0
    return joined + taken_apart if i % each == 0 else max(joined, taken_apart)


def _numel(tensors: Sequence[Tensor]) -> int:
    return sum(prod(size) for _, size in tensors)
