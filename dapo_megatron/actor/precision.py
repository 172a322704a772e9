"""FP8 training: the options as megatron-core's arguments, and what each recipe needs, checked before anything starts.

Without TransformerEngine megatron-core trains in bfloat16 and says nothing (fp8_utils.py, get_fp8_context), so the
checks are ours. They are pure; `read_machine` gathers the facts. Sources: megatron-core 0.16.1 (fp8_utils.py,
transformer_config.py) and TransformerEngine 2.20.2 (pytorch/quantization.py, pytorch/utils.py, tensor/*_tensor.py).
"""

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version

from dapo_megatron.config import PrecisionConfig, RunConfig
from dapo_megatron.distributed.sizes import expert_tensor_parallel_size
from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import ModelShape


@dataclass(frozen=True)
class Recipe:
    """What one FP8 recipe needs."""

    transformer_engine: str
    """Oldest version with which megatron-core builds it."""
    capability: tuple[int, int]
    """Lowest CUDA compute capability."""
    cuda: str
    """Oldest CUDA that torch is built for."""
    block: int
    """Rows and columns of every matrix product are multiples of it."""
    tokens: int
    """Tokens on each tensor-parallel rank are a multiple of it (TransformerEngine's blocks)."""
    fp8_format: str
    """TransformerEngine's own default."""
    exchanges: bool = False
    """Every pass exchanges the tensors' maxima between the ranks."""


RECIPES = {
    "delayed": Recipe("1.0.0", (8, 9), "12.1", block=16, tokens=16, fp8_format="hybrid", exchanges=True),
    "tensorwise": Recipe("2.2.0.dev0", (8, 9), "12.1", block=16, tokens=16, fp8_format="hybrid"),
    "blockwise": Recipe("2.3.0.dev0", (9, 0), "12.9", block=16, tokens=128, fp8_format="e4m3"),
    "mxfp8": Recipe("2.1.0", (10, 0), "12.1", block=32, tokens=32, fp8_format="e4m3"),
}


@dataclass(frozen=True)
class Machine:
    """What the checks need to know of a machine."""

    transformer_engine: str | None
    """Version; None is not installed."""
    capability: tuple[int, int] | None
    """Compute capability of the weakest GPU; None is no GPU."""
    cuda: str | None
    """CUDA that torch is built for; None is a CPU build."""


def model_arguments(precision: PrecisionConfig) -> dict[str, Any]:
    """Further arguments of megatron-core's TransformerConfig."""
    if precision.fp8 == "off":
        return {}
    start, end = precision.bf16_layers_at_start, precision.bf16_layers_at_end
    return {
        "fp8": precision.fp8_format or RECIPES[precision.fp8].fp8_format,
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": start + end > 0,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


def ddp_arguments(precision: PrecisionConfig) -> dict[str, Any]:
    """Further arguments of megatron-core's DistributedDataParallelConfig."""
    if not precision.fp8_param_gather:
        return {}
    return {"fp8_param_gather": True} | _shared_buffer(precision)


def optimizer_arguments(precision: PrecisionConfig) -> dict[str, Any]:
    """Further arguments of megatron-core's OptimizerConfig."""
    if not precision.fp8_param_gather:
        return {}
    return {"fp8_recipe": precision.fp8} | _shared_buffer(precision)


def _shared_buffer(precision: PrecisionConfig) -> dict[str, Any]:
    # An MXFP8 parameter cannot be a view of the parameter buffer, so megatron-core gathers bfloat16 values through the
    # gradients' buffer instead; both configs must say so (param_and_grad_buffer.py).
    return {"reuse_grad_buf_for_mxfp8_param_ag": True} if precision.fp8 == "mxfp8" else {}


def require_precision(config: RunConfig, shape: ModelShape) -> None:
    """check_precision on this machine; looks at it only where FP8 is asked for.

    Raises:
        ConfigError: as check_precision.
    """
    if config.precision.fp8 != "off":
        check_precision(config, shape, read_machine())


def read_machine() -> Machine:
    """The facts of this machine."""
    import torch

    installed = importlib.util.find_spec("transformer_engine") is not None
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Machine(
        transformer_engine=metadata.version("transformer-engine") if installed else None,
        capability=min((torch.cuda.get_device_capability(i) for i in gpus), default=None),
        cuda=torch.version.cuda,
    )


def check_precision(config: RunConfig, shape: ModelShape, machine: Machine) -> None:
    """Check an FP8 config against itself, the model and the machine.

    Raises:
        ConfigError: one line for the first thing that is missing.
    """
    if config.precision.fp8 != "off":
        _check_options(config, shape)
        _check_machine(config.precision, machine)
        _check_sizes(config, shape)


def _check_options(config: RunConfig, shape: ModelShape) -> None:
    p, what = config.precision, f"precision.fp8={config.precision.fp8}"
    if config.model.dtype != "bfloat16":
        raise ConfigError(f"{what} needs model.dtype=bfloat16, not {config.model.dtype}")
    if config.actor.layer_spec == "torch":
        raise ConfigError(
            f"{what} needs TransformerEngine's layers: set actor.layer_spec to auto or transformer_engine"
        )
    layers = {"start": p.bf16_layers_at_start, "end": p.bf16_layers_at_end}
    if p.fp8 == "delayed" and any(layers.values()):
        raise ConfigError(
            f"{what} cannot keep first or last layers in bfloat16 (megatron-core enters FP8 once for all layers): "
            "set precision.bf16_layers_at_start and _at_end to 0 or take another recipe"
        )
    chunks = config.actor.virtual_pipeline_model_parallel_size
    if p.fp8_param_gather and (shape.experts is not None or chunks > 1):
        raise ConfigError(
            "precision.fp8_param_gather=true is not supported for a mixture of experts or an interleaved pipeline: "
            "set it to false"
        )
    stage = shape.layers // (config.actor.pipeline_model_parallel_size * chunks)
    for end, count in layers.items():
        if count > stage:
            raise ConfigError(f"precision.bf16_layers_at_{end}={count} exceeds the {stage} layers of a model chunk")


def _check_machine(precision: PrecisionConfig, machine: Machine) -> None:
    recipe, what = RECIPES[precision.fp8], f"precision.fp8={precision.fp8}"
    oldest = recipe.transformer_engine
    if machine.transformer_engine is None:
        raise ConfigError(
            f"{what} needs TransformerEngine, which is not installed (megatron-core alone would train in bfloat16): "
            "pip install '.[te]', or set precision.fp8=off"
        )
    if Version(machine.transformer_engine) < Version(oldest):
        raise ConfigError(
            f"{what} needs TransformerEngine {oldest} or newer, {machine.transformer_engine} is installed"
        )
    if machine.capability is None:
        raise ConfigError(f"{what} needs a GPU, and torch finds none: set precision.fp8=off")
    if machine.capability < recipe.capability:
        raise ConfigError(
            f"{what} needs CUDA compute capability {_dotted(recipe.capability)} or higher, this GPU has "
            f"{_dotted(machine.capability)}: take {_recipes_for(machine.capability)}"
        )
    # TransformerEngine refuses MXFP8 there: its products do not exist for every layout.
    if precision.fp8 == "mxfp8" and machine.capability >= (12, 0):
        raise ConfigError(f"{what} is not supported by TransformerEngine on compute capability 12.0 or higher")
    if machine.cuda is None or Version(machine.cuda) < Version(recipe.cuda):
        raise ConfigError(f"{what} needs torch built for CUDA {recipe.cuda} or newer, this one is for {machine.cuda}")


def _check_sizes(config: RunConfig, shape: ModelShape) -> None:
    recipe, what = RECIPES[config.precision.fp8], f"precision.fp8={config.precision.fp8}"
    tp = config.actor.tensor_model_parallel_size
    attention = shape.heads * shape.head_dim
    sizes = {
        "hidden size": shape.hidden,
        f"attention heads x head size / TP {tp}": attention // tp,
        f"query, key and value rows / TP {tp}": (attention + 2 * shape.kv_heads * shape.head_dim) // tp,
    }
    if shape.experts is None:
        sizes[f"intermediate size / TP {tp}"] = shape.ffn // tp
    else:
        sizes["experts' intermediate size / ETP"] = shape.experts.ffn // expert_tensor_parallel_size(config.actor)
    for name, size in sizes.items():
        if size % recipe.block:
            raise ConfigError(f"{what} needs the model's {name} to be a multiple of {recipe.block}, it is {size}")
    # Sequence parallelism gathers quantized activations, and a block of 128 hidden values must not be cut.
    if config.precision.fp8 == "blockwise" and tp > 1 and config.actor.sequence_parallel and shape.hidden % 128:
        raise ConfigError(
            f"{what} under sequence parallelism needs a hidden size that is a multiple of 128, it is {shape.hidden}: "
            "set actor.sequence_parallel=false"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _recipes_for(capability: tuple[int, int]) -> str:
    return " or ".join([name for name, recipe in RECIPES.items() if recipe.capability <= capability] or ["off"])
