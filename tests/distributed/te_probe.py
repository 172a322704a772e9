"""Build TransformerEngine's layers and recipes without a GPU and print, as JSON, what came out.

    python -m tests.distributed.te_probe SOURCES

SOURCES is a folder that holds the package `transformer_engine`; see tests/te_stub.py.
"""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

from dapo_megatron.compat import prepare_trainer
from tests import te_stub

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
CUDA = ("12.4", "12.8", "12.9", "13.0")
FAMILIES = [
    ("llama", False),
    ("qwen2", True),
    ("qwen2", False),
    ("qwen3", True),
    ("qwen3", False),
    ("qwen3_moe", False),
]


def families() -> dict:
    """{family: its Megatron parameters, layer classes and tensors that a round trip changed}."""
    from safetensors.torch import load_file

    from dapo_megatron.actor.model import build_model
    from dapo_megatron.checkpoint.conversion.stored_keys import object_keys, places
    from dapo_megatron.weights.exporter import export_stage
    from dapo_megatron.weights.hf_config import read_model
    from dapo_megatron.weights.importer import load_hf_weights, named_parameters
    from dapo_megatron.weights.table import hf_names, parameter_mappings
    from tests.tiny import hf_folder, run_config

    out = {}
    for kind, tied in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            path = hf_folder(Path(folder), kind, tied)
            shape = read_model(path)
            config = run_config(path, model={"dtype": "bfloat16"}, precision={"fp8": "blockwise"})
            modules = [chunk.module for chunk in build_model(config, shape)]
            load_hf_weights(path, modules, shape)
            original, exported = load_file(path / "model.safetensors"), dict(export_stage(modules, shape))
            out[f"{kind} {'tied' if tied else 'untied'}"] = {
                "parameters": sorted(named_parameters(modules, shape)),
                "rules": sorted(parameter_mappings(shape)),
                "hf": sorted(hf_names(shape)),
                "exported": sorted(exported),
                "changed": [n for n, t in exported.items() if not t.equal(original[n].bfloat16())],
                "layers": sorted({type(m).__name__ for m in modules[0].decoder.modules()}),
                "asked": asked(modules),
                "stored": sorted({place.key for _, place in places(shape)} | set(object_keys(shape))),
            }
    return out


def asked(modules) -> list[str]:
    """Keys of all that a load of the weights wants from a distributed checkpoint."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    entries = [e for m in modules for e in m.sharded_state_dict(metadata={"singleton_local_shards": False}).values()]
    return sorted({e.unique_key if isinstance(e, ShardedObject) else e.key for e in entries})


def recipes() -> dict:
    """{recipe: the object that megatron-core makes of our arguments, and where its autocast is on}."""
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    from dapo_megatron.actor.model import DTYPES, transformer_config
    from dapo_megatron.actor.precision import RECIPES
    from dapo_megatron.weights.hf_config import read_model
    from tests.tiny import hf_folder, run_config

    def config_of(path, **precision):
        config = run_config(path, model={"dtype": "bfloat16"}, precision=precision)
        return transformer_config(config.actor, config.precision, shape, DTYPES["bfloat16"])

    out = {}
    with tempfile.TemporaryDirectory() as folder:
        path = hf_folder(Path(folder), layers=4)
        shape = read_model(path)
        for name in RECIPES:
            layers = {} if name == "delayed" else {"bf16_layers_at_start": 1, "bf16_layers_at_end": 2}
            mcore = config_of(path, fp8=name, **layers)
            recipe = get_fp8_recipe(mcore)
            on = []
            for layer in range(shape.layers):
                with get_fp8_context(mcore, layer):
                    on.append(FP8GlobalStateManager.is_fp8_enabled())
            e4m3 = get_fp8_recipe(config_of(path, fp8=name, fp8_format="e4m3"))
            out[name] = {
                "class": type(recipe).__name__,
                "format": recipe.fp8_format.name,
                "on": on,
                "e4m3": e4m3.fp8_format.name,
            }
    return out


def support() -> list:
    """[recipe, capability, CUDA, TransformerEngine supports it] for every combination."""
    import torch
    from transformer_engine.pytorch import quantization as q

    checks = {"delayed": "fp8", "tensorwise": "fp8", "blockwise": "fp8_block_scaling", "mxfp8": "mxfp8"}
    out = []
    for capability, cuda in itertools.product(CAPABILITIES, CUDA):
        torch.version.cuda = cuda
        q.get_device_compute_capability = lambda capability=capability: capability
        for recipe, name in checks.items():
            uncached = getattr(q, f"_compute_{name}_support", None) or getattr(q, f"check_{name}_support").__wrapped__
            out.append([recipe, capability, cuda, uncached()[0]])
    return out


def main() -> None:
    """Print one JSON object."""
    from dataclasses import asdict

    from dapo_megatron.distributed.layout import init_parallel
    from dapo_megatron.actor.precision import read_machine
    from launch.ports import reserved_ports
    from tests.tiny import run_config

    with reserved_ports(1) as (port,):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        init_parallel(run_config(Path("unused")))
    print(
        json.dumps({"families": families(), "recipes": recipes(), "machine": asdict(read_machine()), "te": support()})
    )


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    te_stub.install(capability=(10, 0), cuda="13.0")
    prepare_trainer()
    main()
