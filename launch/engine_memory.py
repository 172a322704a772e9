"""What one GPU of an SGLang engine holds, or one of its processes on a CPU, and whether that is enough. Pure.

SGLang gives `engine.mem_fraction` of the GPU to weights and KV cache; activations and CUDA graphs take of the rest.
"""

from dataclasses import dataclass

from dapo_megatron.actor.memory import ITEM
from dapo_megatron.checkpoint.size import weight_elements
from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import ModelShape


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU or process."""

    weights: int
    kv_cache: int
    """0: the weights leave no room, or it is not known."""
    kv_tokens: int
    """That the KV cache of the whole engine holds."""


def engine_memory(config: RunConfig, shape: ModelShape, gpu_bytes: int | None) -> EngineMemory:
    """Of an engine on GPUs of so many bytes, in its own type.

    None: on a CPU. Without engine.max_total_tokens the KV cache there takes what the node has free, which is not known.
    """
    tp, item = config.engine.tensor_parallel_size, ITEM[config.engine_dtype]
    weights = weight_elements(shape) * item // tp
    # Where there are more GPUs than key-value heads, several hold the same head.
    token = 2 * shape.layers * max(1, shape.kv_heads // tp) * shape.head_dim * item
    given = config.engine.max_total_tokens
    if gpu_bytes is None:
        tokens = given or 0
    else:
        tokens = max(0, int(gpu_bytes * config.engine.mem_fraction) - weights) // token
        tokens = tokens if given is None else min(tokens, given)
    return EngineMemory(weights, tokens * token, tokens)


def check_engine_memory(config: RunConfig, found: EngineMemory, gpu_gib: float) -> None:
    """Raise ConfigError where an engine could not hold its weights, or not one whole sequence beside them."""
    e = config.engine
    what = f"engine.tensor_parallel_size={e.tensor_parallel_size}, engine.mem_fraction={e.mem_fraction:g}"
    weights = f"{found.weights / 2**30:.1f} GiB of weights a GPU"
    if not found.kv_cache:
        raise ConfigError(
            f"{what}: {weights} leave no KV cache in GPUs of {gpu_gib:g} GiB: raise engine.tensor_parallel_size"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if found.kv_tokens < longest:
        raise ConfigError(
            f"{what}: beside {weights} the KV cache holds {found.kv_tokens} tokens, one sequence may have {longest}: "
            "raise engine.tensor_parallel_size, engine.mem_fraction or engine.max_total_tokens"
        )
