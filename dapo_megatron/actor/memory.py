"""Bytes that one trainer GPU needs, by part, from the numbers of a model and the layout. Pure.

    parameters    model.dtype, this rank's slices of its stage
    gradients     float32, one for each parameter
    optimizer     AdamW's two moments and, for bfloat16, the float32 masters, spread over data and context parallelism
    activations   what autograd keeps of the micro-batches in flight (1F1B: PP - stage of them)
    work          buffers of one layer's backward (its gathered input, gradients) and outputs sent to the next stage;
                  an estimate
    loss          backward of the token loss, on the last stage: the gathered rows, their gradient, a chunk of logits
    gather        a fully_reshardable save: one of the three optimizer tensors whole, and the shard of it that is sent

Parameters, gradients, optimizer and activations are held against counted bytes (tests/distributed/test_memory.py); the
kernels' own workspace, NCCL and fragmentation are not in them. FP8 is counted as bfloat16: weights kept in FP8 stand in
memory twice, by rows and by columns. Tokens are taken to be spread evenly over the experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.config import ActorConfig, RunConfig
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.table import ParameterMapping, hf_shapes, parameter_mappings

ITEM = {"float32": 4, "bfloat16": 2}
FLOAT, LONG = 4, 8


@dataclass(frozen=True)
class StageParameters:
    """Elements that one rank of a pipeline stage holds."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a pipeline stage, by part."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    loss: int
    gather: int

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stage"}

    @property
    def held(self) -> int:
        """What stays between updates."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most at one time, in an update or in a save: work, loss and gather come one after the other."""
        return self.held + max(self.activations + max(self.work, self.loss), self.gather)


def trainer_memory(config: RunConfig, shape: ModelShape, *, fused: bool = True) -> list[StageMemory]:
    """Of every pipeline stage, with micro-batches of `longest_micro_batch` tokens.

    Args:
        fused: norms and attention are TransformerEngine's; otherwise torch's on a CPU, which keep more.
    """
    stages = range(config.actor.pipeline_model_parallel_size)
    return [_stage_memory(config, shape, stage, longest_micro_batch(config), fused) for stage in stages]


def fullest(stages: Iterable[StageMemory]) -> StageMemory:
    """The stage that needs most."""
    return max(stages, key=lambda stage: stage.peak)


def longest_micro_batch(config: RunConfig) -> int:
    """Tokens of the largest micro-batch on one context-parallel rank: the budget, or one sequence that exceeds it."""
    rules = packing_rules(config)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = max(config.actor.micro_batch_tokens, -(-longest // rules.sequence_multiple) * rules.sequence_multiple)
    tokens = -(-tokens // rules.total_multiple) * rules.total_multiple
    return tokens // config.actor.context_parallel_size


def stage_parameters(actor: ActorConfig, shape: ModelShape, stage: int) -> StageParameters:
    """Elements of one rank's parameters, its share of experts included."""
    dense = experts = 0
    for mapping in parameter_mappings(shape).values():
        if stage not in _stages_of(mapping, actor, shape):
            continue
        if mapping.expert is None:
            dense += _slice(mapping, shape, actor.tensor_model_parallel_size)
        else:
            experts += _slice(mapping, shape, expert_tensor_parallel_size(actor))
    return StageParameters(dense, experts // actor.expert_model_parallel_size)


def shards(actor: ActorConfig) -> tuple[int, int]:
    """Ranks over which the optimizer of a stage's (dense parameters, experts) is spread."""
    ranks = actor.world_size // actor.pipeline_model_parallel_size
    dense = actor.data_parallel_size * actor.context_parallel_size
    return dense, ranks // (expert_tensor_parallel_size(actor) * actor.expert_model_parallel_size)


def layer_activations(actor: ActorConfig, shape: ModelShape, tokens: int, item: int, *, fused: bool) -> int:
    """Bytes that autograd keeps of one layer for one micro-batch.

    Args:
        tokens: of the micro-batch on one context-parallel rank.
        item: bytes of an activation.
        fused: see trainer_memory.
    """
    tp, cp = actor.tensor_model_parallel_size, actor.context_parallel_size
    rows = _rows(actor, tokens)
    q, kv, heads = shape.heads * shape.head_dim // tp, shape.kv_heads * shape.head_dim // tp, shape.heads // tp
    kept = 2 * _norm(rows, shape.hidden, item, fused=fused)
    kept += rows * shape.hidden * item  # input of the query, key and value projection
    if shape.family.qk_norm:
        kept += tokens * ((q + kv) * item + (heads + shape.kv_heads // tp) * FLOAT)
        if not fused:  # the projection's whole output, and where a rank has several groups a copy of its queries
            kept += tokens * (q + 2 * kv + (q if shape.kv_heads > tp else 0)) * item
    kept += tokens * 4 * shape.head_dim * item  # cosines and sines, for queries and for keys
    kept += tokens * (2 * q * item + heads * FLOAT)  # queries, outputs, log sum exp
    kept += tokens * 2 * kv * item * (1 if fused else cp)
    if not fused:
        kept += tokens * (q * item + 2 * LONG)  # outputs of the sequences put together, and their rows
        kept += tokens * tokens * cp * FLOAT if cp > 1 else 0  # the mask of one sequence
    return kept + (_mlp if shape.experts is None else _mixture)(actor, shape, tokens, item)


def _mlp(actor: ActorConfig, shape: ModelShape, tokens: int, item: int) -> int:
    # Input; gate and up together; the gate's activation, up, and their product.
    ffn = shape.ffn // actor.tensor_model_parallel_size
    return _rows(actor, tokens) * shape.hidden * item + tokens * 5 * ffn * item


def _mixture(actor: ActorConfig, shape: ModelShape, tokens: int, item: int) -> int:
    experts, etp = shape.require_experts, expert_tensor_parallel_size(actor)
    rows = _rows(actor, tokens)
    sent = rows * experts.per_token * etp
    kept = rows * shape.hidden * item  # input of the router
    kept += rows * (experts.count * (1 + FLOAT) + experts.per_token * (2 * LONG + FLOAT))  # who goes where
    return kept + sent * (shape.hidden * item + 6 * (experts.ffn // etp) * item + FLOAT)


def _stage_memory(config: RunConfig, shape: ModelShape, stage: int, tokens: int, fused: bool) -> StageMemory:
    actor, item = config.actor, ITEM[config.model.dtype]
    counts, (dense, experts) = stage_parameters(actor, shape, stage), shards(actor)
    state = 8 if config.model.dtype == "float32" else 12  # float32 parameters are their own masters
    return StageMemory(
        stage=stage,
        parameters=counts.total * item,
        gradients=counts.total * FLOAT,
        optimizer=state * counts.dense // dense + state * counts.experts // experts,
        activations=_activations(actor, shape, stage, tokens, item, fused),
        work=_work(actor, shape, stage, tokens, item),
        loss=_loss(actor, shape, stage, tokens, item),
        gather=FLOAT * max(counts.dense + counts.dense // dense, counts.experts + counts.experts // experts),
    )


def _activations(actor: ActorConfig, shape: ModelShape, stage: int, tokens: int, item: int, fused: bool) -> int:
    """All layers of all micro-batches in flight, and the ends of the model."""
    pp, chunks = actor.pipeline_model_parallel_size, actor.virtual_pipeline_model_parallel_size
    layers, in_flight = shape.layers // (pp * chunks), _in_flight(actor, stage)
    rows, layer = _rows(actor, tokens), layer_activations(actor, shape, tokens, item, fused=fused)
    hidden = rows * shape.hidden * item
    kept = in_flight * layers * (hidden if actor.recompute else layer)
    if stage == 0:
        kept += tokens * (LONG + (1 if actor.tensor_model_parallel_size > 1 else 0))
    end = _norm(rows, shape.hidden, item, fused=fused) + hidden if stage == pp - 1 else 0
    # The final norm's backward is over before a layer is computed again, and that layer has its input already.
    return kept + (max(end, layer - hidden) if actor.recompute else end)


def _in_flight(actor: ActorConfig, stage: int) -> int:
    """Micro-batches of one model chunk that are forward of their backward at the same time."""
    pp, chunks = actor.pipeline_model_parallel_size, actor.virtual_pipeline_model_parallel_size
    return pp - stage if chunks == 1 else 2 * (pp - stage - 1) + (chunks - 1) * pp + 1


def _work(actor: ActorConfig, shape: ModelShape, stage: int, tokens: int, item: int) -> int:
    tp, pp = actor.tensor_model_parallel_size, actor.pipeline_model_parallel_size
    ffn = shape.ffn // tp if shape.experts is None else shape.experts.ffn * shape.experts.per_token // tp
    sent = _in_flight(actor, stage) * _rows(actor, tokens) * shape.hidden if pp > 1 else 0
    return (tokens * (2 * shape.hidden + 4 * ffn) + sent) * item


def _loss(actor: ActorConfig, shape: ModelShape, stage: int, tokens: int, item: int) -> int:
    if stage != actor.pipeline_model_parallel_size - 1:
        return 0
    vocab = shape.padded_vocab(actor.tensor_model_parallel_size) // actor.tensor_model_parallel_size
    rows = tokens * shape.hidden * (2 * item + FLOAT)
    return rows + vocab * shape.hidden * item + actor.loss_chunk_tokens * vocab * (FLOAT + item)


def _rows(actor: ActorConfig, tokens: int) -> int:
    """Tokens of a micro-batch whose hidden states one rank holds between the layers."""
    tp = actor.tensor_model_parallel_size
    return tokens // tp if actor.sequence_parallel else tokens


def _norm(rows: int, width: int, item: int, *, fused: bool) -> int:
    """Its input and one number a row; torch on a CPU also keeps the normalised input."""
    return rows * (width * item * (1 if fused else 2) + FLOAT)


def _stages_of(mapping: ParameterMapping, actor: ActorConfig, shape: ModelShape) -> set[int]:
    """Pipeline stages that hold a parameter."""
    pp, chunks = actor.pipeline_model_parallel_size, actor.virtual_pipeline_model_parallel_size
    section, _, rest = mapping.megatron.partition("layers.")
    if rest:
        return {int(rest.split(".")[0]) // (shape.layers // (pp * chunks)) % pp}
    if section.startswith("embedding"):
        return {0}
    is_the_embedding = section.startswith("output_layer") and shape.tied and pp == 1
    return set() if is_the_embedding else {pp - 1}


def _slice(mapping: ParameterMapping, shape: ModelShape, tp: int) -> int:
    """Elements of one tensor-parallel rank's slice."""
    if mapping.kind == "rows":
        return shape.padded_vocab(tp) // tp * shape.hidden
    whole = sum(prod(s) for s in hf_shapes(mapping, shape))
    return whole if mapping.kind == "whole" else whole // tp
