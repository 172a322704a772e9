"""Does the trainer compute what transformers computes? Log-probs of both, on the CPU in float32.

    python -m dapo_megatron.trainer.check_model FOLDER

Random tokens in packed sequences, every position, the whole vocabulary. One of the two models is in memory at a time.
"""

import argparse
import os
from math import prod
from pathlib import Path

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

import psutil
import torch
import torch.distributed as dist
import transformers
from huggingface_hub.errors import StrictDataclassError
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed import HashStore  # type: ignore[attr-defined]

from dapo_megatron.actor.model import policy_module, transformer_config
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.errors import ConfigError, DapoError, exit_code
from dapo_megatron.process import leave
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import HfFolder, check_weights
from dapo_megatron.weights.importer import load_hf_weights
from dapo_megatron.weights.rotary import scaled_frequencies

LENGTHS = (97, 32, 5)
"""Tokens of the packed sequences."""
TOLERANCE = 1e-3
"""Largest |log-prob difference|: rounding gives 1e-6 to 1e-4, more the more layers there are."""


def main() -> int:
    """Compare and print; 1 after an error or a difference, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.trainer.check_model", description=__doc__)
    parser.add_argument("folder", type=Path, help="Hugging Face checkpoint folder")
    folder = parser.parse_args().folder
    return exit_code(lambda: print(f"pass: {check_model(folder)}"))


def check_model(folder: Path) -> str:
    """Compare the trainer's model with transformers'.

    Returns:
        The largest difference and where it is, in words.

    Raises:
        DapoError: the model is not supported or too large for the memory, or it differs by more than TOLERANCE.
    """
    shape = read_model(folder)
    files = HfFolder(folder)
    check_weights(files, shape)
    _require_memory(files, shape)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(shape.vocab, (n,), generator=generator) for n in LENGTHS]
    with torch.no_grad():
        theirs = _transformers_logprobs(folder, shape, sequences)
        ours = _trainer_logprobs(folder, shape, sequences)
    difference = (ours - theirs).abs().nan_to_num(float("inf"))
    worst = float(difference.max())
    position, token = divmod(int(difference.argmax()), shape.vocab)
    found = (
        f"{folder}: largest |log-prob difference| to transformers {worst:.1e} (position {position}, token {token}), "
        f"mean {float(difference.mean()):.1e}, over {len(ours)} positions and {shape.vocab} tokens"
    )
    if worst > TOLERANCE:
        raise DapoError(f"fail: {found}; {TOLERANCE:.0e} is allowed")
    return found


def _require_memory(files: HfFolder, shape: ModelShape) -> None:
    weights = 4 * sum(prod(size) for _, _, size in files.headers())
    needed = 1.25 * weights + 6 * 4 * sum(LENGTHS) * shape.vocab
    free = psutil.virtual_memory().available
    if needed > free:
        raise DapoError(
            f"{files.path}: the check needs {needed / 2**30:.1f} GiB of memory (float32), {free / 2**30:.1f} are free: "
            "check a smaller model of the same family"
        )


def _transformers_logprobs(folder: Path, shape: ModelShape, sequences: list[torch.Tensor]) -> torch.Tensor:
    """[positions, vocabulary] float32."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, AttributeError, IndexError, TypeError, ValueError) as e:  # a value it does not expect
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"{folder / 'config.json'} is refused by transformers: {reason}") from None
    if shape.rope_scaling is not None and "attn_factor" in dict(shape.rope_scaling.options):
        config.rope_parameters["attention_factor"] = scaled_frequencies(shape)[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, trust_remote_code=False
    ).eval()
    return torch.cat([model(ids[None], use_cache=False).logits[0].log_softmax(-1) for ids in sequences])


def _trainer_logprobs(folder: Path, shape: ModelShape, sequences: list[torch.Tensor]) -> torch.Tensor:
    """[positions, vocabulary] float32, of one rank with torch's layers."""
    sections = {"model": {"path": str(folder), "dtype": "float32"}, "data": {"train": "none"}}
    config = RunConfig.model_validate(sections | {"actor": {"layer_spec": "torch"}})
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        init_parallel(config)
    mcore = transformer_config(config.actor, config.precision, shape, torch.float32)
    module = policy_module(config, shape, mcore, None).eval()
    load_hf_weights(folder, [module], shape)
    ends = torch.tensor([0, *torch.tensor([len(ids) for ids in sequences]).cumsum(0)], dtype=torch.int32)
    longest = max(len(ids) for ids in sequences)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    hidden = module(torch.cat(sequences)[None], positions[None], None, packed_seq_params=packed)[:, 0]
    return (hidden @ module.output_weight.T).log_softmax(-1)


if __name__ == "__main__":
    leave(main())
