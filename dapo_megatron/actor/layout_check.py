"""Does the model fit the layout? Checked before anything is started. Pure."""

from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import ModelShape


def check_layout(config: RunConfig, shape: ModelShape) -> None:
    """Check the numbers of a model against the layout and the engine's context.

    Raises:
        ConfigError: one line that names both numbers.
    """
    actor = config.actor
    ranks = actor.world_size // actor.pipeline_model_parallel_size
    if ranks % (actor.expert_model_parallel_size * expert_tensor_parallel_size(actor)):
        raise ConfigError(
            f"actor.expert_model_parallel_size={actor.expert_model_parallel_size} must divide the {ranks} ranks of a "
            "pipeline stage (TP x CP x DP)"
        )
    for size, option, what, count in _divisions(config, shape):
        if count % size:
            raise ConfigError(f"{option}={size} does not divide the model's {what} {count}")
    tp = actor.tensor_model_parallel_size
    if shape.vocab <= shape.padded_vocab(tp) // tp * (tp - 1):
        raise ConfigError(
            f"actor.tensor_model_parallel_size={tp} leaves a rank without one of the {shape.vocab} tokens"
        )
    if actor.expert_model_parallel_size > 1 and shape.experts is None:
        raise ConfigError(
            f"actor.expert_model_parallel_size={actor.expert_model_parallel_size}, but {shape.family.architecture} "
            "has no experts"
        )
    if shape.experts is not None and actor.tensor_model_parallel_size > 1 and not actor.sequence_parallel:
        raise ConfigError("a mixture of experts under tensor parallelism needs actor.sequence_parallel=true")
    if shape.family.post_norm and (actor.layer_spec == "transformer_engine" or config.precision.fp8 != "off"):
        raise ConfigError(
            f"{shape.family.architecture} has torch's layers only: leave actor.layer_spec at auto and precision.fp8 off"
        )
    if config.engine.context_length > shape.max_positions:
        raise ConfigError(
            f"engine.context_length={config.engine.context_length} exceeds the model's "
            f"max_position_embeddings={shape.max_positions}"
        )
    if shape.window is not None and config.engine.context_length > shape.window:
        raise ConfigError(
            f"engine.context_length={config.engine.context_length} exceeds the model's "
            f"sliding_window={shape.window}: the trainer's attention has no window"
        )


def _divisions(config: RunConfig, shape: ModelShape) -> list[tuple[int, str, str, int]]:
    a = config.actor
    tp = a.tensor_model_parallel_size
    stages = a.pipeline_model_parallel_size * a.virtual_pipeline_model_parallel_size
    stage_option = "actor.pipeline_model_parallel_size"
    if a.virtual_pipeline_model_parallel_size > 1:
        stage_option += " x virtual_pipeline_model_parallel_size"
    widths = [("number of attention heads", shape.heads), ("number of key-value heads", shape.kv_heads)]
    rows = [(stages, stage_option, "number of layers", shape.layers)]
    if shape.experts is None:
        widths.append(("intermediate size", shape.ffn))
    else:
        ep = a.expert_model_parallel_size
        rows.append((ep, "actor.expert_model_parallel_size", "number of experts", shape.experts.count))
        if expert_tensor_parallel_size(a) > 1:
            widths.append(("experts' intermediate size", shape.experts.ffn))
    return [(tp, "actor.tensor_model_parallel_size", what, count) for what, count in widths] + rows
