"""What the GPU tests share: the model, a run of the worker, and how two runs are compared."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.tiny import KINDS


def model_folder(path: Path, kind: str = "qwen3") -> Path:
    """A random Hugging Face checkpoint in bfloat16 whose sizes suit every recipe (multiples of 128)."""
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model_class(config).bfloat16().save_pretrained(path)
    return path


def run_worker(folder: Path, path: Path, **sections: dict) -> dict:
    """What tests/gpu/worker.py saved; its sections replace those of tests/tiny.py."""
    sections = {"model": {"dtype": "bfloat16"}, "optimizer": {"lr": 1e-4, "warmup_steps": 0}} | sections
    job, out = folder / "job.json", folder / "out.pt"
    job.write_text(json.dumps({"path": str(path), "sections": sections}))
    command = [sys.executable, "-m", "tests.gpu.worker", str(job), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def has_transformer_engine() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of two sets of tensors, each taken as one vector."""
    assert a.keys() == b.keys()
    x, y = (torch.cat([t[name].double().flatten() for name in sorted(t)]) for t in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())
