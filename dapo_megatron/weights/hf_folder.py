"""The tensors of a Hugging Face checkpoint folder: found as transformers finds them, checked before they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dapo_megatron.errors import ConfigError, DapoError, DataError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_json
from dapo_megatron.weights.table import check_names, hf_shapes, parameter_mappings, some_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")
"""safetensors' names of the types that hold weights as they are; any other needs scales."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that only unpickling reads: it can run anything, so they are never opened."""
COMPARED_ROWS = 4096
WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)
"""Ends of the names of files that hold weights, or say where they are."""
_NOT_BESIDE = (*WEIGHTS, *PICKLES, ".onnx", ".onnx_data", ".ot")
TWIN = "consolidated"
"""Mistral's folders hold the weights a second time, under its own names: files that begin so."""
LONGEST_NAME = 255
"""Bytes, of a file."""
SMALL = 64 << 20
"""Bytes: no tokenizer is larger."""


def side_files(folder: Path, *, nested: bool = True) -> list[str]:
    """The files of a Hugging Face folder that are no weights, and the index of those; hidden folders are left out.

    An index beside model.safetensors, which goes before it, is left out too.

    Args:
        nested: also those in folders; otherwise only small ones (SMALL bytes) that lie in the folder itself.

    Raises:
        DataError: a link among those in folders leads to a folder, or to nothing.
    """
    found = [INDEX] if (folder / INDEX).is_file() and not (folder / SINGLE).exists() else []
    for path in sorted(folder.rglob("*") if nested else folder.iterdir()):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts[:-1])
        if hidden or path.name.endswith(_NOT_BESIDE):
            continue
        if not path.is_file():
            if nested and path.is_symlink():
                raise DataError(f"{path} is a link to {path.readlink()}, which is no file: copy or remove it")
            continue
        if nested or path.stat().st_size <= SMALL:
            found.append(str(name))
    return found


class HfFolder:
    """The tensors of a Hugging Face checkpoint folder, read one at a time.

    `model.safetensors` goes before an index, as in transformers (a folder may hold both, of different ages).

    Raises:
        ConfigError: no safetensors, an unreadable file or index, a tensor that is not where the index says, or one that
            several files hold, or a file that nothing would read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if (self.path / SINGLE).exists():
            with self._open(SINGLE) as f:
                self.files = dict.fromkeys(f.keys(), SINGLE)
            self._refuse_strays(SINGLE)
        elif (self.path / INDEX).exists():
            self.files = self._indexed()
            self._refuse_strays(INDEX)
        else:
            raise ConfigError(self._no_weights())

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU, in its own type."""
        with self._open(self.files[name]) as f:
            return f.get_tensor(name)

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Some rows of a tensor: nothing else of it is read."""
        with self._open(self.files[name]) as f:
            return f.get_slice(name)[begin:end]

    def headers(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, safetensors' type, shape) of every tensor, without reading any."""
        for file in sorted(set(self.files.values())):
            with self._open(file) as f:
                for name in f.keys():
                    part = f.get_slice(name)
                    yield name, part.get_dtype(), tuple(part.get_shape())

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors of one shape hold the same values; some rows of each are in memory at a time."""
        with self._open(self.files[a]) as f, self._open(self.files[b]) as g:
            left, right = f.get_slice(a), g.get_slice(b)
            rows = left.get_shape()[0]
            return left.get_shape() == right.get_shape() and all(
                torch.equal(left[i : i + COMPARED_ROWS], right[i : i + COMPARED_ROWS])
                for i in range(0, rows, COMPARED_ROWS)
            )

    def _no_weights(self) -> str:
        if not self.path.is_dir():
            return f"{self.path} is not a folder: give a Hugging Face checkpoint folder"
        pickled = sorted(p.name for p in self.path.iterdir() if p.suffix in PICKLES)
        if pickled:
            return (
                f"{self.path / pickled[0]} is a pickle, which can run code and is never opened: load the model in "
                "transformers where you trust it, and save_pretrained writes safetensors"
            )
        return f"{self.path}: no {SINGLE} and no index: give a Hugging Face checkpoint folder"

    def _weight_map(self) -> dict[str, str]:
        index = self.path / INDEX
        files = read_json(index, "").get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
            raise ConfigError(f"{index} has no weight_map of tensor and file names: download the checkpoint again")
        for name, file in files.items():
            if not is_weights_name(file):
                raise ConfigError(
                    f"{index} has {some_names([name[:100]])} in {file[:100]!r}, which is no name of a safetensors file "
                    "in the folder itself: mend the entry, or download the checkpoint again"
                )
        return files

    def _indexed(self) -> dict[str, str]:
        index, files = self.path / INDEX, self._weight_map()
        held: dict[str, str] = {}
        twice: set[str] = set()
        for file in sorted(set(files.values())):
            if not (self.path / file).is_file():
                raise ConfigError(f"{index} names {file}, which does not exist: download the checkpoint again")
            with self._open(file) as f:
                twice |= held.keys() & set(f.keys())
                held |= dict.fromkeys(f.keys(), file)
        if twice:
            raise ConfigError(
                f"{self.path}: {len(twice)} tensors are in more than one file, and readers choose differently: "
                f"{some_names(twice)}: download the checkpoint again"
            )
        for name, file in files.items():
            if held.get(name) != file:
                raise ConfigError(
                    f"{index} has {some_names([name])} in {file}, which does not hold it: download the checkpoint again"
                )
        return held

    def _refuse_strays(self, read: str) -> None:
        """Raise where there is a file whose tensors nothing reads: they may be part of the model.

        Those of an index beside model.safetensors are the same weights in another form.
        """
        found = {path.name for path in self.path.glob("*.safetensors") if not path.name.startswith((TWIN, "."))}
        strays = found - set(self.files.values())
        if strays and read == SINGLE and (self.path / INDEX).exists():
            strays -= set(self._weight_map().values())
        for name in sorted(strays):
            raise ConfigError(
                f"{self.path / name} would be left out, {read} does not have it: move it away if it is not needed"
            )

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / file, framework="pt") as f:
                yield f
        except (SafetensorError, OSError) as e:
            reason = str(e).splitlines()[0]
            kind = ConfigError if isinstance(e, SafetensorError) else DapoError  # a disk may be back later
            raise kind(f"{self.path / file} is not a readable safetensors file: {reason}") from None


def is_weights_name(name: str) -> bool:
    """Whether weights may be under this name: a file in the folder itself that transformers reads as safetensors."""
    fits = name.isprintable() and len(name.encode()) <= LONGEST_NAME
    return fits and name.endswith(".safetensors") and Path(name).name == name


def check_weights(folder: HfFolder, shape: ModelShape) -> None:
    """Account for every tensor of a checkpoint from the files' headers.

    Raises:
        ConfigError: a tensor is missing, unexpected, of the wrong shape or of a type that needs scales, or a tied model
            has an output layer of its own.
    """
    found = {name: (kind, size) for name, kind, size in folder.headers()}
    for name, (kind, _) in found.items():
        if kind not in FLOATS:
            raise ConfigError(f"{folder.path}: {some_names([name])} has type {kind}: give bfloat16, float16 or float32")
    check_names(set(found), shape, str(folder.path))
    wrong = [
        f"{name} has shape {found[name][1]}, config.json says {expected}"
        for mapping in parameter_mappings(shape).values()
        for name, expected in zip(mapping.hf, hf_shapes(mapping, shape), strict=True)
        if found[name][1] != expected
    ]
    if wrong:
        raise ConfigError(f"{folder.path}: {some_names(wrong, order=False)}")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if shape.tied and head in found and not folder.equal(embedding, head):
        raise ConfigError(
            f"{folder.path}: config.json says tie_word_embeddings=true, but {head} differs from {embedding}: readers "
            "choose differently; set it to false, or remove the tensor"
        )
