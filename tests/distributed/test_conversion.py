"""Converted checkpoints in real modules: every layout loads them, with the numbers that transformers computes."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from megatron.core.packed_seq_params import PackedSeqParams
from tests.distributed.test_checkpoint import controller_at, updates
from tests.tiny import UNLIKE, byte_tokenizer, hf_folder, run_config

from dapo_megatron.checkpoint.conversion.dist_to_hf import convert_dist_to_hf
from dapo_megatron.checkpoint.distributed import Checkpointer, save_weights
from dapo_megatron.checkpoint.conversion.hf_to_dist import convert_hf_to_dist
from dapo_megatron.checkpoint.load import load_weights
from dapo_megatron.checkpoint.safe_metadata import read_metadata
from dapo_megatron.checkpoint.train_state import TrainState
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
    found = {
        k: t for part in run_ranks(config.world_size, exported, config, tmp_path / "dist") for k, t in part.items()
    }
    original = load_file(path / "model.safetensors")
    assert found.keys() == original.keys()
    assert [name for name, array in found.items() if not torch.equal(torch.from_numpy(array), original[name])] == []


def saved_again(config, converted, checkpoint):
    """The weights of a converted checkpoint as this layout stores them."""
    save_weights(config, load(config, converted), TrainState(), checkpoint)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_through_tp2_pp2_a_folder_comes_back_byte_for_byte(tmp_path, dtype):
    """67 entries: the output layer is stored with a row of padding."""
    path = hf_folder(tmp_path / "hf", "qwen2", False, layers=4, vocab=67, **UNLIKE)
    weights = {name: t.to(getattr(torch, dtype)) for name, t in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(path)
    convert_hf_to_dist(path, tmp_path / "dist", None, QUIET)
    config, again = run_config(path, actor=LAYOUTS["tp2_pp2"], model={"dtype": dtype}), tmp_path / "again"
    run_ranks(4, saved_again, config, tmp_path / "dist", again)
    assert read_metadata(again / "model").state_dict_metadata["output_layer.weight"].size == (68, 64)
    convert_dist_to_hf(again, tmp_path / "back", None, path, QUIET)
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def logits(config, checkpoint, ids):
    """[tokens, vocabulary] of the actor's model for one sequence."""
    actor = load(config, checkpoint)
    (module,) = actor.modules
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=len(ids), max_seqlen_kv=len(ids)
    )
    with torch.no_grad():
        hidden = module.eval()(ids[None], torch.arange(len(ids))[None], None, packed_seq_params=packed)[:, 0]
        return (hidden @ module.output_weight.T).numpy()


PARITY = [("qwen2", True), ("qwen3_moe", False)]
FAMILIES = [("llama", False), ("mistral", False), ("qwen2", False), ("qwen3", True), ("olmo2", False)]


def difference(path, checkpoint):
    """Largest |logit difference| to transformers on the same folder, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (41,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    (ours,) = run_ranks(1, logits, run_config(path), checkpoint, ids)
    return float((torch.from_numpy(ours) - theirs).abs().max())


@pytest.mark.parametrize(("kind", "tied"), PARITY + (FAMILIES + [("qwen3_moe_raw", False)] if ALL else []))
def test_logits_are_those_of_transformers(tmp_path, kind, tied):
    path = hf_folder(tmp_path / "hf", kind, tied, layers=3, vocab=67, **({} if kind == "olmo2" else UNLIKE))
    convert_hf_to_dist(path, tmp_path / "dist", None, QUIET)
    assert difference(path, tmp_path / "dist") < 1e-4


SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"no {SMOLLM2}: python tools/fetch_smollm2.py models/smollm2")
def test_logits_of_smollm2(tmp_path):
    convert_hf_to_dist(SMOLLM2, tmp_path / "dist", None, QUIET)
    assert difference(SMOLLM2, tmp_path / "dist") < 1e-4


def trained_and_saved(config):
    """{Hugging Face name: array} of this rank's stage, at the moment of the checkpoint."""
    actor = actor_on_rank(config)
    updates(config, actor, 2)
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(1, 7, 0), controller_at(1), format="dp_reshardable")
    checkpointer.finish()
    return {name: tensor.float().numpy() for name, tensor in export_stage(actor.modules, actor.shape)}


SAVED = [("qwen3", True, "tp2_pp2", "float32"), ("qwen3_moe", False, "tp2_ep2", "bfloat16")]
SAVED_WIDER = [
    (k, t, x, d) for k, t in [("qwen2", False), ("olmo2", True)] for x, d in [("vpp2", "bfloat16"), ("tp2", "float32")]
]


@pytest.mark.parametrize(("kind", "tied", "layout", "dtype"), SAVED + (SAVED_WIDER if ALL else []))
def test_a_checkpoint_of_a_run_becomes_the_model_it_trained(tmp_path, kind, tied, layout, dtype):
    """67 entries: 68 rows are stored under tensor parallelism, 67 are exported."""
    path = hf_folder(tmp_path / "hf", kind, tied, layers=4, vocab=67)
    config = run_config(path, actor=LAYOUTS[layout], model={"dtype": dtype})
    config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    parts = run_ranks(config.world_size, trained_and_saved, config)
    expected = {name: torch.from_numpy(array) for part in parts for name, array in part.items()}
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    convert_dist_to_hf(checkpoint, tmp_path / "out", None, None, QUIET)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    assert [name for name, tensor in found.items() if not torch.equal(tensor.float(), expected[name])] == []
    original = load_file(path / "model.safetensors")
    assert not torch.equal(found["model.norm.weight"].float(), original["model.norm.weight"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
