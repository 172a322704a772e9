"""Conversion there and back: the same bytes, whatever the model and the files."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo_megatron.checkpoint.conversion import hf_to_dist, output
from dapo_megatron.checkpoint.integrity import intact_manifest
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.errors import DapoError
from dapo_megatron.weights import hf_writer
from dapo_megatron.weights.hf_folder import INDEX, HfFolder
from tests.tiny import UNLIKE, byte_tokenizer, hf_folder
from tests.unit.checkpoint.conversions import EMBEDDING, HEAD, NORM, there, back, tree, rewrite, shuffled_into, unsigned


@pytest.mark.parametrize(
    ("kind", "tied", "options"),
    [
        ("qwen2", True, {"vocab": 67}),
        ("qwen3_moe", False, {"vocab": 101, "num_experts": 3}),
        ("llama", False, UNLIKE | {"vocab": 1}),
        ("mistral", True, {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6}),
        ("olmo2", True, {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("qwen3", False, {"layers": 5, "intermediate_size": 1}),
    ],
)
def test_a_folder_comes_back_byte_for_byte(tmp_path, monkeypatch, kind, tied, options):
    monkeypatch.setattr(hf_to_dist, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(hf_to_dist, "PART_BYTES", 30_000)
    path = hf_folder(tmp_path / "hf", kind, tied, **options)
    byte_tokenizer().save_pretrained(path)
    (path / "templates").mkdir()
    (path / "templates" / "tool.jinja").write_text("{{ x }}")
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").write_text("")
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back")
    before = tree(path)
    del before[".cache/lock"]
    assert tree(tmp_path / "back") == before
    assert len(list((tmp_path / "dist" / "model").glob("*.distcp"))) > 3
    assert intact_manifest(tmp_path / "dist").format == "weights"


def test_several_files_in_any_order_and_types_that_differ_come_back(tmp_path):
    path = hf_folder(tmp_path / "hf", "qwen2", False, layers=3, vocab=67)
    kinds = {
        "model.layers.1.self_attn.k_proj.weight": torch.float32,
        "model.layers.2.mlp.up_proj.weight": torch.float16,
    }
    rewrite(path, lambda tensors: {n: t.to(kinds.get(n, torch.bfloat16)) for n, t in tensors.items()})
    shuffled_into(path, 4)
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path)
    assert read_manifest(tmp_path / "dist").dtype == "mixed"


def test_a_tied_model_that_repeats_its_embedding_comes_back_so(tmp_path):
    path = hf_folder(tmp_path / "hf", "qwen3", True, vocab=67)
    rewrite(path, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path)
    assert b"output_layer" not in (tmp_path / "dist" / "model" / ".metadata").read_bytes()


def test_the_types_are_the_checkpoints_own_not_those_of_like(tmp_path):
    path = hf_folder(tmp_path / "hf")
    rewrite(path, lambda tensors: tensors | {NORM: tensors[NORM].double()})
    there(path, tmp_path / "dist")
    like = hf_folder(tmp_path / "like")
    rewrite(like, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    back(tmp_path / "dist", tmp_path / "back", like=like)
    original, found = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "back"))
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in original.items()}


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    path = hf_folder(tmp_path / "hf")
    rewrite(path, lambda tensors: tensors | {NORM: torch.full((64,), 1e5)})
    says = "model.norm.weight has numbers that are too large for float16"
    with pytest.raises(DapoError, match=says):
        there(path, tmp_path / "half", torch.float16)
    there(path, tmp_path / "dist")
    with pytest.raises(DapoError, match=says):
        back(tmp_path / "dist", tmp_path / "back", torch.float16)
    rewrite(path, lambda tensors: tensors | {NORM: torch.full((64,), float("inf"))})  # is so in any type
    there(path, tmp_path / "other", torch.float16)


def test_files_that_have_the_names_of_ours_come_back(tmp_path):
    path = hf_folder(tmp_path / "hf")
    for name in ("journal.json", "journal.json.new", "layout.json", "manifest.json", "__0_0.distcp"):
        (path / name).write_text("another")
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path)


def test_one_file_with_an_index_stays_readable_in_another_type(tmp_path):
    path = hf_folder(tmp_path / "hf")
    shuffled_into(path, 1)
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back", torch.bfloat16)
    assert set(HfFolder(tmp_path / "back").files.values()) == {"weights-0.safetensors"}


def test_a_file_of_nothing_but_rotary_buffers_is_left_out(tmp_path):
    path = hf_folder(tmp_path / "hf", "llama", False)
    shuffled_into(path, 1)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({buffer: torch.ones(8)}, path / "rotary.safetensors")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][buffer] = "rotary.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back")
    assert set(HfFolder(tmp_path / "back").files.values()) == {"weights-0.safetensors"}
    assert not (tmp_path / "back" / "rotary.safetensors").exists()


def test_rotary_buffers_of_old_folders_are_left_out(tmp_path):
    path = hf_folder(tmp_path / "hf", "llama", False)
    original = load_file(path / "model.safetensors")
    rewrite(path, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    there(path, tmp_path / "dist")
    back(tmp_path / "dist", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == original.keys() and all(torch.equal(found[n], original[n]) for n in found)


@pytest.mark.parametrize("where", ["there", "back"])
def test_another_type_is_a_plain_cast_and_the_config_says_so(tmp_path, where):
    path = hf_folder(tmp_path / "hf", "qwen2", False, vocab=67)
    shuffled_into(path, 2)
    there(path, tmp_path / "dist", torch.bfloat16 if where == "there" else None)
    back(tmp_path / "dist", tmp_path / "back", torch.bfloat16 if where == "back" else None)
    for file in ("weights-0.safetensors", "weights-1.safetensors"):
        original, found = load_file(path / file), load_file(tmp_path / "back" / file)
        assert list(original) == list(found)
        assert all(torch.equal(found[n], t.bfloat16()) for n, t in original.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = sum(t.nbytes for t in found.values()) + sum(
        t.nbytes for t in load_file(tmp_path / "back" / "weights-0.safetensors").values()
    )
    assert json.loads((tmp_path / "back" / INDEX).read_text())["metadata"]["total_size"] == sizes
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    assert read_manifest(tmp_path / "dist").dtype == ("bfloat16" if where == "there" else "float32")


def test_without_a_known_layout_transformers_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "MAX_FILE_BYTES", 60_000)
    path = hf_folder(tmp_path / "hf", "qwen3", True, vocab=67)
    there(path, tmp_path / "dist")
    unsigned(tmp_path / "dist", lambda: (tmp_path / "dist" / output.LAYOUT).unlink())
    back(tmp_path / "dist", tmp_path / "back")
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    original = load_file(path / "model.safetensors")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())
    # a folder of the same model says where its tensors are
    back(tmp_path / "dist", tmp_path / "like", like=path)
    assert tree(tmp_path / "like") == tree(path)
