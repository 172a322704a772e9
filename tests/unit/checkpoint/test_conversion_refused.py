"""Every fault of a source or of a checkpoint is one line, before anything is written."""

import json
import os
import pickle
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.checkpoint import integrity
from dapo_megatron.checkpoint.conversion import output, stored_keys
from dapo_megatron.checkpoint.conversion.stored_weights import StoredWeights
from dapo_megatron.errors import DapoError
from dapo_megatron.weights.hf_config import read_model
from tests.tiny import hf_folder
from tests.unit.checkpoint.conversions import (
    damage,
    EMBEDDING,
    NORM,
    there,
    back,
    rewrite,
    shuffled_into,
    refusal,
    tree,
    unsigned,
)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def without(name):
    return lambda folder: rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})


def with_strangers(folder):
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(3) for name in "ab"})


def two_files_with_one_tensor(folder):
    shuffled_into(folder, 2)
    tensors = load_file(folder / "weights-1.safetensors")
    first = load_file(folder / "weights-0.safetensors")
    name = sorted(tensors)[0]
    save_file(first | {name: tensors[name]}, folder / "weights-0.safetensors")


def configured(**options):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))

    return change


def only_pickles(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def a_name_twice(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.dumps(json.loads(data[8 : 8 + length])[NORM])
    header = data[8 : 8 + length].rstrip()[:-1] + f',"{NORM}":{entry}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "is not a readable safetensors file"),
        (without(NORM), f"1 tensors are missing: {NORM}"),
        (
            lambda folder: rewrite(folder, lambda t: t | {"a": t[NORM] + 2, "b": t[NORM] + 1}),
            "not part of the model: a, b",
        ),
        (two_files_with_one_tensor, "1 tensors are in more than one file"),
        (a_name_twice, f"has {NORM} twice"),
        (only_pickles, "pytorch_model.bin is a pickle, which can run code and is never opened"),
        (configured(num_hidden_layers=3), "11 tensors are missing: model.layers.2.input_layernorm.weight, "),
        (configured(num_hidden_layers=1), "11 tensors are not part of the model: "),
        (
            configured(num_key_value_heads=4),
            "k_proj.weight has shape (32, 64), config.json says (64, 64), model",
        ),
        (configured(num_attention_heads=6), "says (96, 64)"),
        (configured(vocab_size=65), f"{EMBEDDING} has shape (64, 64), config.json says (65, 64)"),
        (configured(tie_word_embeddings=True), "lm_head.weight differs"),
        (configured(attention_bias=True), "attention_bias=true is not supported"),
        (lambda folder: shutil.rmtree(folder), "has no config.json"),
    ],
)
def test_faults_of_the_source_are_one_line_before_anything_is_written(tmp_path, fault, says):
    path = hf_folder(tmp_path / "hf", "qwen3", False)
    fault(path)
    assert says in refusal(lambda: there(path, tmp_path / "dist"), tmp_path / "dist")


def test_an_output_inside_of_what_is_converted_is_refused(tmp_path):
    path = hf_folder(tmp_path / "hf", "qwen3", False)
    inside = path / "sub" / "dist"
    assert f"{inside} lies in {path}, which is read" in refusal(lambda: there(path, inside), inside)
    assert f"{path} is {path}, which is read" in refusal(lambda: there(path, path))
    dist = tmp_path / "dist"
    there(path, dist)
    inside = tmp_path / "hf" / ".." / "dist" / "hf2"
    assert "which is read: choose an output elsewhere" in refusal(lambda: back(dist, inside), inside)
    assert f"{path / 'new'} lies in {path}" in refusal(lambda: back(dist, path / "new", like=path), path / "new")
    path = path.rename(tmp_path / "out.partial")
    for call in (lambda: there(path, tmp_path / "out"), lambda: back(dist, tmp_path / "out", like=path)):
        with pytest.raises(DapoError, match=f"{path} is {path}, which is read"):
            call()


def test_what_is_in_the_way_is_named_and_stays(tmp_path):
    path, out, partial = hf_folder(tmp_path / "hf"), tmp_path / "dist", tmp_path / "dist.partial"
    out.symlink_to("/nowhere")
    assert "dist exists: remove it" in refusal(lambda: there(path, out))
    out.unlink()
    (tmp_path / "elsewhere").mkdir()
    for make in (
        lambda: partial.write_text("mine"),
        lambda: partial.symlink_to("/nowhere"),
        lambda: partial.symlink_to(tmp_path / "elsewhere"),
    ):
        make()
        with pytest.raises(DapoError, match="dist.partial, where the output would be made, is no folder: move it away"):
            there(path, out)
        partial.unlink()
    partial.mkdir()
    (partial / "mine").write_text("")
    with pytest.raises(DapoError, match="dist.partial, where the output would be made, holds something else"):
        there(path, out)
    assert tree(partial) == {"mine": b""}


def move_out(layout):
    (header,) = json.loads(layout.read_text()).values()
    layout.write_text(json.dumps({"../x": header}))


class Planted:
    def __reduce__(self):
        return os.mkdir, (os.environ["PLANTED"],)


def plant(checkpoint):
    (checkpoint / "model" / ".metadata").write_bytes(pickle.dumps(Planted()))


def other_metadata(change):
    def call(checkpoint):
        file = checkpoint / "model" / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        change(metadata)
        file.write_bytes(pickle.dumps(metadata))

    return call


def forget_layer(metadata):
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
    chunks[:] = [c for c in chunks if c.offsets[0] != 1]


def elsewhere(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"


FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (plant, "it asks for posix.mkdir"),
        (other_metadata(lambda m: m.state_dict_metadata.pop(FC2)), f"1 weights are missing: {FC2}"),
        (
            other_metadata(lambda m: m.state_dict_metadata.update({"decoder.x": m.state_dict_metadata[FC2]})),
            "1 weights are not part of the model: decoder.x",
        ),
        (other_metadata(forget_layer), f"the pieces of {FC2} leave gaps or overlap"),
        (other_metadata(elsewhere), "in ../../secret, outside the checkpoint"),
        (lambda path: configured(vocab_size=70)(path / "hf"), "holds a model with vocab=64, "),
        (lambda path: cut(path / "model" / "__0_0.distcp"), "cannot be read"),
        (lambda path: (path / "layout.json").write_text("{"), "layout.json is damaged"),
        (lambda path: move_out(path / "layout.json"), "layout.json names '../x', "),
    ],
)
def test_a_hostile_or_wrong_checkpoint_is_one_line(tmp_path, monkeypatch, change, says):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    path, dist = hf_folder(tmp_path / "hf", "qwen3", False), tmp_path / "dist"
    there(path, dist)
    unsigned(dist, lambda: change(dist))
    assert says in refusal(lambda: back(dist, tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "planted").exists()


def test_damage_is_refused_before_anything_is_read(tmp_path):
    path, dist, out = hf_folder(tmp_path / "hf", "qwen3", False), tmp_path / "dist", tmp_path / "back"
    there(path, dist)
    for file in ("model/__0_0.distcp", "model/.metadata", "hf/config.json", "layout.json"):
        damage(dist / file, 40)
        assert f"{file} is damaged" in refusal(lambda: back(dist, out), out)
        damage(dist / file, 40)
    (dist / "model" / "stray").write_text("")
    assert "stray does not belong to the checkpoint" in refusal(lambda: back(dist, out), out)
    (dist / "model" / "stray").unlink()
    (dist / "hf" / "generation_config.json").rename(dist / "other")
    assert "generation_config.json is missing" in refusal(lambda: back(dist, out), out)
    assert "has no manifest.json: give one checkpoint" in refusal(lambda: back(path, out), out)
    (dist / "other").rename(dist / "hf" / "generation_config.json")
    assert "holds a model with" in refusal(lambda: back(dist, out, like=hf_folder(tmp_path / "b", "llama")), out)
    assert "has no config.json: give a Hugging Face folder" in refusal(
        lambda: back(dist, out, like=dist / "model"), out
    )
    back(dist, out)


def test_the_stored_vocabulary_may_be_padded_and_not_cut(tmp_path):
    path = hf_folder(tmp_path / "hf", "qwen3", False, vocab=64)
    there(path, tmp_path / "dist")
    stored, shape = StoredWeights(tmp_path / "dist/model"), read_model(path)
    for vocab in (64, 61):
        stored.check(replace(shape, vocab=vocab))
    with pytest.raises(
        DapoError, match=r"embedding.word_embeddings.weight has shape \(64, 64\), config.json says \(65, "
    ):
        stored.check(replace(shape, vocab=65))


def test_a_table_that_forgets_or_repeats_a_tensor_is_an_error(tmp_path):
    shape = read_model(hf_folder(tmp_path, "qwen3_moe", False))
    table = stored_keys.places(shape)
    stored_keys.account(table, shape)
    forgotten, repeated = table[:-1], [*table, table[-1]]
    with pytest.raises(DapoError, match="mlp.experts.3.down_proj.weight is used 0 times.*is filled 0 times"):
        stored_keys.account([pair for pair in table if not pair[0].megatron.endswith("3.linear_fc2.weight")], shape)
    with pytest.raises(DapoError, match="is used 0 times"):
        stored_keys.account(forgotten, shape)
    with pytest.raises(DapoError, match=r"is used 2 times, .* is filled 2 times"):
        stored_keys.account(repeated, shape)


@pytest.mark.parametrize("at", [0, -3000], ids=["what says how to read it", "a number"])
def test_weights_that_are_damaged_are_named_though_they_are_read_before_they_are_checked(tmp_path, monkeypatch, at):
    """They are checked meanwhile: what was made of them by then is neither kept nor written down as done."""
    dist, out = there_and_small(tmp_path, monkeypatch)
    (path,) = dist.glob("model/*.distcp")
    content = bytearray(path.read_bytes())
    content[at : at + 64 or None] = bytes(64)
    path.write_bytes(content)
    assert f"{path} is damaged" in refusal(lambda: back(dist, out), out)


def test_nothing_is_published_before_the_weights_are_checked(tmp_path, monkeypatch):
    dist, out = there_and_small(tmp_path, monkeypatch)
    (path,) = dist.glob("model/*.distcp")
    seen = []

    def late(*_, names):
        if f"model/{path.name}" in names:
            time.sleep(1.0)
            journal = out.with_name("out.partial") / output.JOURNAL
            seen.append((out.exists(), b"xxh3" in journal.read_bytes()))

    monkeypatch.setattr(integrity, "check_hashes", late)
    back(dist, out)
    assert seen == [(False, False)] and out.exists()


def there_and_small(tmp_path, monkeypatch):
    """A checkpoint whose weights are large, for a small BLOCK, each part of which is written down; and an output."""
    monkeypatch.setattr(integrity, "BLOCK", 100_000)
    monkeypatch.setattr(output, "JOURNAL_EVERY", 1)
    there(hf_folder(tmp_path / "hf"), tmp_path / "dist")
    return tmp_path / "dist", tmp_path / "out"
