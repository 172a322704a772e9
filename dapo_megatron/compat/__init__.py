"""Everything that makes megatron-core and SGLang run without CUDA or TransformerEngine; nothing else knows of it."""

from pathlib import Path

import torch

SGLANG_CPU = Path(__file__).parent / "sglang_cpu"
"""Goes first on the PYTHONPATH of an SGLang server on CPU."""


def prepare_trainer() -> None:
    """Call first in a process that trains; with CUDA the CPU patches are not even imported."""
    if not torch.cuda.is_available():
        from dapo_megatron.compat import megatron_cpu

        megatron_cpu.install()
        torch.set_num_threads(1)
    from dapo_megatron.compat import adam

    adam.install()
