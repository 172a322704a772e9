"""The tensors of a folder: where transformers finds them, and every kind of damage in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.errors import ConfigError, DataError
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import HfFolder, check_weights, side_files
from tests.tiny import hf_folder

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def check(folder):
    check_weights(HfFolder(folder), read_model(folder))


def refusal(folder) -> str:
    with pytest.raises(ConfigError) as e:
        check(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def change(folder, **tensors):
    """Replace tensors of model.safetensors by name; None removes one."""
    kept = load_file(folder / "model.safetensors") | tensors
    save_file({n: t for n, t in kept.items() if t is not None}, folder / "model.safetensors")


def split(folder, index=None):
    """The same tensors in two files with an index; `index` changes what it says."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, folder / file)
    weight_map = {n: file for file, held in files.items() for n in held}
    text = json.dumps({"weight_map": weight_map | (index or {})})
    (folder / "model.safetensors.index.json").write_text(text)
    return weight_map


def test_one_file_and_several_hold_the_same(tmp_path):
    one, several = (hf_folder(tmp_path / name) for name in ("one", "several"))
    split(several)
    check(one)
    check(several)
    for name in HfFolder(one).files:
        assert torch.equal(HfFolder(one).tensor(name), HfFolder(several).tensor(name))


def test_the_single_file_goes_before_an_index(tmp_path):
    path = hf_folder(tmp_path)
    tensors = load_file(path / "model.safetensors")
    split(path)
    save_file(tensors | {NORM: torch.full((64,), 7.0)}, path / "model.safetensors")
    assert HfFolder(path).tensor(NORM).tolist() == [7.0] * 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"weight_map": {"model.nor', "cannot be read as JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": null}', "has no weight_map"),
        ('{"weight_map": {"model.norm.weight": 3}}', "has no weight_map"),
        ('["model.norm.weight"]', "must hold a JSON object"),
        ('{"weight_map": {"model.norm.weight": "c.safetensors"}}', "names c.safetensors, which does not exist"),
    ],
)
def test_broken_indexes(tmp_path, text, says):
    path = hf_folder(tmp_path)
    split(path)
    (path / "model.safetensors.index.json").write_text(text)
    assert says in refusal(path)


def test_a_tensor_that_is_not_where_the_index_says(tmp_path):
    path = hf_folder(tmp_path / "a")
    split(path, {"model.extra.weight": "a.safetensors"})
    assert "has model.extra.weight in a.safetensors, which does not hold it" in refusal(path)
    path = hf_folder(tmp_path / "b")
    where = split(path)[NORM]
    split_again = {NORM: "a.safetensors" if where == "b.safetensors" else "b.safetensors"}
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= split_again
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"has {NORM} in {split_again[NORM]}, which does not hold it" in refusal(path)


def test_a_tensor_that_the_index_leaves_out_is_not_overlooked(tmp_path):
    path = hf_folder(tmp_path)
    change(path, **{"model.vision.weight": torch.ones(2)})
    split(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.vision.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.vision.weight" in refusal(path)


@pytest.mark.parametrize(
    "file",
    [
        *("a" * 300 + ".safetensors", "ü" * 200 + ".safetensors", "{outside}", "../out.safetensors"),
        *("sub/a.safetensors", "..", "", "a", "a.bin", "tokenizer.json", "a\nb.safetensors", "\ud800.safetensors"),
    ],
)
def test_an_entry_of_the_index_that_is_no_name_in_the_folder(tmp_path, file):
    path = hf_folder(tmp_path / "hf")
    where = split(path, {NORM: file.format(outside=tmp_path / "out.safetensors")})
    for place in (tmp_path, path / "sub"):
        place.mkdir(exist_ok=True)
        for name in ("out.safetensors", "a.safetensors", "a", "a.bin", "tokenizer.json"):
            (place / name).write_bytes((path / where[NORM]).read_bytes())
    says = refusal(path)
    assert (
        f"has {NORM} in " in says and "no name of a safetensors file in the folder itself" in says and len(says) < 400
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_file_that_nothing_reads_is_refused(tmp_path, several):
    path = hf_folder(tmp_path)
    if several:
        split(path)
    for twin in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors"):  # Mistral's copies
        save_file({"norm.weight": torch.ones(64)}, path / twin)
    check(path)
    save_file({"model.vision.weight": torch.ones(2)}, path / "adapter.safetensors")
    read = "model.safetensors.index.json" if several else "model.safetensors"
    assert f"{path / 'adapter.safetensors'} would be left out, {read} does not have it" in refusal(path)


def test_beside_both_a_single_file_and_an_index_too(tmp_path):
    path = hf_folder(tmp_path)
    tensors = load_file(path / "model.safetensors")
    split(path)
    save_file(tensors, path / "model.safetensors")
    check(path)
    save_file({"model.vision.weight": torch.ones(2)}, path / "adapter.safetensors")
    assert f"{path / 'adapter.safetensors'} would be left out, model.safetensors does not have it" in refusal(path)


def test_a_tensor_with_a_line_break_in_its_name(tmp_path):
    path = hf_folder(tmp_path)
    change(path, **{"model.\nvision": torch.ones(2)})
    assert r"not part of the model: 'model.\nvision'" in refusal(path)


def test_no_weights_and_torn_weights(tmp_path):
    path = hf_folder(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is not a readable safetensors file" in refusal(path)
    file.unlink()
    assert "no model.safetensors and no index" in refusal(path)


@pytest.mark.parametrize(("kind", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_types_that_need_scales_are_refused(tmp_path, kind, name):
    path, q = hf_folder(tmp_path), "model.layers.1.self_attn.q_proj.weight"
    change(path, **{q: torch.zeros(64, 64).to(kind)})
    assert f"{q} has type {name}" in refusal(path)


def test_wrong_shapes_missing_and_extra_tensors(tmp_path):
    path = hf_folder(tmp_path)
    change(path, **{NORM: torch.ones(63)})
    assert f"{NORM} has shape (63,), config.json says (64,)" in refusal(path)
    change(path, **{NORM: None})
    assert "1 tensors are missing" in refusal(path)
    change(path, **{NORM: torch.ones(64), "extra": torch.ones(1)})
    assert "1 tensors are not part of the model: extra" in refusal(path)


def test_a_tied_model_with_an_output_layer_of_its_own(tmp_path):
    path = hf_folder(tmp_path, tied=True)
    embedding = load_file(path / "model.safetensors")[EMBEDDING]
    change(path, **{"lm_head.weight": embedding.clone()})
    check(path)
    embedding[-1, -1] += 1e-3
    change(path, **{"lm_head.weight": embedding})
    assert "tie_word_embeddings=true, but lm_head.weight differs" in refusal(path)
    change(path, **{"lm_head.weight": embedding[:-1].clone()})
    assert "tie_word_embeddings=true, but lm_head.weight differs" in refusal(path)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_among_the_side_files_that_is_no_file_is_refused(tmp_path, target):
    folder = tmp_path / "hf"
    for place in (folder / "assets", folder / ".cache", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
    (tmp_path / "elsewhere" / "guide.md").write_text("a guide")
    (folder / "assets" / "guide.md").symlink_to(tmp_path / "elsewhere" / "guide.md")
    (folder / ".cache" / "hidden").symlink_to(tmp_path / target)
    assert side_files(folder) == ["assets/guide.md"]
    (folder / "assets" / "more").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=f"assets/more is a link to .*/{target}, which is no file: copy or remove it"):
        side_files(folder)
    assert side_files(folder, nested=False) == []
