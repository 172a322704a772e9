"""Conversion there and back: the same bytes, after interrupts too; and every kind of damage is one line."""

import fcntl
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time

import msgspec
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from dapo_megatron.checkpoint.conversion import hf_to_dist, output, stored_keys
from dapo_megatron.checkpoint.conversion.dist_to_hf import convert_dist_to_hf
from dapo_megatron.checkpoint.conversion.hf_to_dist import convert_hf_to_dist
from dapo_megatron.checkpoint.integrity import intact_manifest, record_of
from dapo_megatron.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from dapo_megatron.checkpoint.conversion.stored_weights import StoredWeights
from dapo_megatron.errors import DapoError, StorageError, told
from dapo_megatron.weights import hf_writer
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import INDEX
from tests.tiny import UNLIKE, byte_tokenizer, hf_folder

QUIET = Console(quiet=True)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def there(source, out, dtype=None):
    return convert_hf_to_dist(source, out, dtype, QUIET)


def back(checkpoint, out, dtype=None, like=None):
    return convert_dist_to_hf(checkpoint, out, dtype, like, QUIET)


def tree(folder):
    """{path: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(folder, change):
    """Change the tensors of model.safetensors: a dict in, a dict out."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def shuffled_into(folder, files, seed=0):
    """The tensors in several files, in any order."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    random.Random(seed).shuffle(names)
    held = {f"weights-{i}.safetensors": names[i::files] for i in range(files)}
    for file, mine in held.items():
        save_file({n: tensors[n] for n in mine}, folder / file, metadata={"format": "pt", "made by": "a test"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, mine in held.items() for n in mine}}
    (folder / INDEX).write_text(json.dumps(index))


def refusal(call, *paths):
    """The one line of a refusal that left nothing behind."""
    with pytest.raises(DapoError) as e:
        call()
    assert "\n" not in str(e.value)
    assert [path for path in paths if path.exists() or path.with_name(path.name + ".partial").exists()] == []
    return str(e.value)


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


def unsigned(checkpoint, change):
    """Change a checkpoint and sign it again, as somebody with bad intent would."""
    change()
    manifest = read_manifest(checkpoint)
    files = {name: record_of(checkpoint / name) for name in manifest.files if (checkpoint / name).exists()}
    (checkpoint / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))


# Interrupts.


class Stop(Exception):
    """Stands for an interrupt."""


def killed_in(function, *args):
    """Run in a process that kills itself; it has no time to tidy up."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def kill_after(owner, name, calls):
    """Replace a method, in a process that is to die, by one that kills it in a later call."""

    def kill(count):
        if count > calls:
            time.sleep(0.3)  # what is on its way to the disk arrives
            os.kill(os.getpid(), signal.SIGKILL)

    counting(setattr, owner, name, kill)


def counting(setattr, owner, name, then=lambda count: None):
    """Replace a method, by `setattr`, by one that counts its calls; returns the count."""
    original, count = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        then(count[0])
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    return count


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(hf_to_dist, "PART_BYTES", 40_000)
    monkeypatch.setattr(hf_to_dist, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(output, "JOURNAL_EVERY", 40_000)


@pytest.mark.parametrize("calls", [0, 9, 30, 43])
def test_a_killed_conversion_goes_on(tmp_path, monkeypatch, small_parts, calls):
    path = hf_folder(tmp_path / "hf", "qwen2", False, layers=3, vocab=67)
    there(path, tmp_path / "whole")

    def killed():
        kill_after(hf_to_dist._Chunk, "read", calls)
        there(path, tmp_path / "dist")

    killed_in(killed)
    assert not (tmp_path / "dist").exists()
    count = counting(monkeypatch.setattr, hf_to_dist._Chunk, "read")
    there(path, tmp_path / "dist")
    assert tree(tmp_path / "dist") == tree(tmp_path / "whole")
    assert not (tmp_path / "dist.partial").exists()
    if calls == 43:
        assert count[0] < 30  # of 50
    assert count[0] >= 50 - calls


@pytest.mark.parametrize("calls", [0, 9, 30])
def test_a_killed_conversion_back_goes_on(tmp_path, monkeypatch, small_parts, calls):
    path = hf_folder(tmp_path / "hf", "qwen2", False, layers=3, vocab=67)
    there(path, tmp_path / "dist")

    def killed():
        kill_after(StoredWeights, "_read", calls)
        back(tmp_path / "dist", tmp_path / "back")

    killed_in(killed)
    assert not (tmp_path / "back").exists()
    count = counting(monkeypatch.setattr, StoredWeights, "_read")
    back(tmp_path / "dist", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(path)
    if calls == 30:
        assert count[0] < 40  # of 50


def interrupted(path, out, calls=30):
    def killed():
        kill_after(hf_to_dist._Chunk, "read", calls)
        there(path, out)

    killed_in(killed)


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, small_parts):
    path, out, partial = hf_folder(tmp_path / "hf", layers=3), tmp_path / "dist", tmp_path / "dist.partial"
    interrupted(path, out)
    (part, *_) = msgspec.json.decode((partial / output.JOURNAL).read_bytes())["done"]

    def refused(says):
        with pytest.raises(DapoError, match=says) as e:
            there(path, out)
        assert str(e.value).startswith(f"{partial}") and str(e.value).endswith("the conversion begins anew")

    with pytest.raises(DapoError, match="was made with dtype=as in the source, to=dist, now it is dtype=bfloat16"):
        there(path, out, torch.bfloat16)
    with pytest.raises(DapoError, match="to=hf"):
        back_of = tmp_path / "other"
        there(path, back_of)
        back(back_of, out)
    os.utime(path / "config.json", (1, 1))
    refused("config.json of the source has changed since")
    shutil.rmtree(partial)
    interrupted(path, out)
    damage(partial / "model" / part, 300)
    refused(f"{part} is not what was written")
    (partial / output.JOURNAL).write_text("{")
    refused("its journal is damaged")
    (partial / output.JOURNAL).unlink()
    refused("it has no journal")
    shutil.rmtree(partial)
    there(path, out)


def test_damage_to_a_half_written_folder_is_seen(tmp_path, small_parts):
    path = hf_folder(tmp_path / "hf", layers=3)
    there(path, tmp_path / "dist")

    def killed():
        kill_after(StoredWeights, "_read", 30)
        back(tmp_path / "dist", tmp_path / "back")

    killed_in(killed)
    file = tmp_path / "back.partial" / "model.safetensors"
    done = msgspec.json.decode((tmp_path / "back.partial" / output.JOURNAL).read_bytes())["done"]
    header = hf_writer.read_header(path / "model.safetensors")
    damage(file, 8 + len(header.encode()) + hf_writer.parse_header(header)[sorted(done)[0]].begin)
    with pytest.raises(DapoError, match=f"{sorted(done)[0]} is not what was written"):
        back(tmp_path / "dist", tmp_path / "back")


def damage(file, offset):
    """Flip one bit."""
    with file.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 4]))


def test_two_processes_do_not_write_one_output(tmp_path):
    path = hf_folder(tmp_path / "hf")
    (tmp_path / "dist.partial").mkdir()
    handle = os.open(tmp_path / "dist.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DapoError, match="is being written by another process"):
        there(path, tmp_path / "dist")
    os.close(handle)
    there(path, tmp_path / "dist")
    with pytest.raises(DapoError, match="dist exists: remove it, or choose another folder"):
        there(path, tmp_path / "dist")


# Faults.


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
        (lambda path: move_out(path / "layout.json"), "layout.json names ../x, "),
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
    assert "has no config.json: give a Hugging Face folder" in refusal(lambda: back(dist, out, like=tmp_path), out)
    back(dist, out)


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


# The disk.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_the_conversion_goes_on(tmp_path, monkeypatch, small_disk, small_parts):
    path, out = hf_folder(tmp_path / "hf", "qwen3", False, layers=8), small_disk / "dist"
    (small_disk / "filling").write_bytes(bytes(1_200_000))
    with pytest.raises(StorageError, match="GB more"):
        there(path, out)
    monkeypatch.setattr(output, "require_room", lambda *_: None)  # another process may fill the disk meanwhile
    with pytest.raises((StorageError, OSError)) as e:
        there(path, out)
    assert isinstance(told(e.value), StorageError) and "make room" in str(told(e.value))
    assert not out.exists()
    (small_disk / "filling").unlink()
    there(path, out)
    shutil.move(out, tmp_path / "dist")
    (small_disk / "filling").write_bytes(bytes(1_200_000))
    with pytest.raises((StorageError, OSError)) as e:
        back(tmp_path / "dist", small_disk / "back")
    assert isinstance(told(e.value), StorageError) and "make room" in str(told(e.value))
    (small_disk / "filling").unlink()
    back(tmp_path / "dist", small_disk / "back")
    assert tree(small_disk / "back") == tree(path)


def test_the_room_is_asked_for_first(tmp_path, monkeypatch):
    path = hf_folder(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="GB more, 0.0 are free: make room"):
        there(path, tmp_path / "dist")
