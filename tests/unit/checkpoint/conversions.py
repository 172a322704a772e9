"""Both directions of a conversion, for the tests of it."""

import json
import random

import msgspec
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from dapo_megatron.checkpoint.conversion.dist_to_hf import convert_dist_to_hf
from dapo_megatron.checkpoint.conversion.hf_to_dist import convert_hf_to_dist
from dapo_megatron.checkpoint.integrity import record_of
from dapo_megatron.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from dapo_megatron.errors import DapoError
from dapo_megatron.weights.hf_folder import INDEX

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


def unsigned(checkpoint, change):
    """Change a checkpoint and sign it again, as somebody with bad intent would."""
    change()
    manifest = read_manifest(checkpoint)
    files = {name: record_of(checkpoint / name) for name in manifest.files if (checkpoint / name).exists()}
    (checkpoint / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))


def damage(file, offset):
    """Flip one bit."""
    with file.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 4]))
