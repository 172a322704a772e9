"""Converted checkpoints in real modules: every layout loads them, with the numbers that transformers computes."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from megatron.core.packed_seq_params import PackedSeqParams
from tests.distributed.test_checkpoint import two_steps_and_save
from tests.tiny import UNLIKE, hf_folder, run_config

from dapo_megatron.checkpoint.dist_to_hf import convert_dist_to_hf
from dapo_megatron.checkpoint.hf_to_dist import convert_hf_to_dist
from dapo_megatron.checkpoint.load import load_weights
from dapo_megatron.weights.exporter import export_stage
from dapo_megatron.weights.hf_config import read_model

QUIET = Console(quiet=True)
LAYOUTS = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp2_ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
ALL = bool(os.environ.get("LAYOUTS"))


def load(config, checkpoint):
    """An actor with the weights of a converted checkpoint, and with others before."""
    actor = actor_on_rank(config)
    with torch.no_grad():
        for module in actor.modules:
            for parameter in module.parameters():
                parameter.zero_()
    load_weights(actor, checkpoint)
    return actor


def exported(config, checkpoint):
    """{Hugging Face name: array} of this rank's stage."""
    return {
        name: t.numpy() for name, t in export_stage(load(config, checkpoint).modules, read_model(config.model.path))
    }


DEFAULT = [("qwen3", True, "tp2_pp2", 67), ("qwen2", False, "vpp2", 67), ("qwen3_moe", False, "tp2_ep2", 67)]
WIDER = [
    (kind, tied, layout, 66 if layout == "one" else 67)
    for kind, tied in [("llama", False), ("mistral", True), ("qwen2", True), ("qwen3", False), ("olmo2", False)]
    for layout in ("one", "tp2", "pp2", "tp2_pp2", "vpp2")
] + [("qwen3_moe", False, layout, 67) for layout in ("one", "ep2", "pp2")]


@pytest.mark.parametrize(("kind", "tied", "layout", "vocab"), DEFAULT + (WIDER if ALL else []))
def test_every_layout_loads_the_very_weights(tmp_path, kind, tied, layout, vocab):
    path = hf_folder(tmp_path / "hf", kind, tied, layers=4, vocab=vocab, **({} if kind == "olmo2" else UNLIKE))
    convert_hf_to_dist(path, tmp_path / "dist", None, QUIET)
    config = run_config(path, actor=LAYOUTS[layout])
    found = {k: t for part in run_ranks(config.world_size, exported, config, tmp_path / "dist") for k, t in part.items()}
    original = load_file(path / "model.safetensors")
    assert found.keys() == original.keys()
    assert [name for name, array in found.items() if not torch.equal(torch.from_numpy(array), original[name])] == []
