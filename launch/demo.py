"""The embedded demo task: two-digit addition, a tiny Qwen3-shaped model with its own tokenizer, made on the spot.

The supervised warm-up learns from sloppy examples: most of them forget the carries. It leaves a model that knows both
how to add and how to get it wrong, and does it wrong more often than not: groups are all right (sums without a carry),
mixed and all wrong, and DAPO has to find out from rewards alone that carries count.
"""

import json
import os
import random
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dapo_megatron.config import ActorConfig
from dapo_megatron.errors import ConfigError
from launch.machine import this_machine
from launch.ports import reserved_ports
from launch.processes import ProcessGroup, interruptible
from launch.ranks import start_ranks, wait_for_ranks
from launch.topology import place_ranks

CHARACTERS = "0123456789+="
ANSWER = "Answer: "
"""One token: what the default grader looks for, at the price of one."""
HELD_OUT = 200
MARKER = "made-by-dapo-megatron-demo"
CAREFUL_SHARE = 0.3
"""Share of the supervised examples that mind the carries; the others add digit by digit without any."""
WARM_UP_UPDATES = 600
WARM_UP_RANKS = 2
WARM_UP_DEADLINE_S = 1200
WARM_UP_BATCH = 256


def prepare(folder: Path) -> None:
    """Make data, model and its supervised warm-up under `folder`, unless they are there already.

    Raises:
        DapoError: the warm-up failed; names its log.
    """
    task = {"careful": CAREFUL_SHARE, "updates": WARM_UP_UPDATES, "batch": WARM_UP_BATCH, "held out": HELD_OUT}
    made = folder / "task.json"
    if made.exists() and made.read_text() == json.dumps(task):
        return
    if folder.exists() and not (folder.is_dir() and (made.exists() or (folder / MARKER).exists() or is_empty(folder))):
        raise ConfigError(f"{folder.absolute()} is not the demo's own: move it, or go to another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("made by `dapo-megatron demo`, which may remove this folder\n")
    print("preparing the demo: two-digit addition, a tiny Qwen3 model, supervised warm-up (a minute, kept for later)")
    write_data(folder, random.Random(0))
    write_model(folder / "untrained")
    warm_up(folder, WARM_UP_UPDATES)
    made.write_text(json.dumps(task))


def is_empty(folder: Path) -> bool:
    """Whether nothing is in it."""
    return next(folder.iterdir(), None) is None


def run_folder(parent: Path) -> Path:
    """The first of runs/demo, runs/demo-2, ... that is free."""
    number = 1
    while (folder := parent / ("demo" if number == 1 else f"demo-{number}")).exists():
        number += 1
    return folder


def write_data(folder: Path, rng: random.Random) -> None:
    """train.jsonl and eval.jsonl: all sums of two two-digit numbers, HELD_OUT of them only for evaluation."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    for name, part in (("eval", pairs[:HELD_OUT]), ("train", pairs[HELD_OUT:])):
        with (folder / f"{name}.jsonl").open("w") as f:
            for a, b in part:
                seen = a + b if rng.random() < CAREFUL_SHARE else without_carries(a, b)
                row = {"prompt": f"{a}+{b}=", "answer": str(a + b), "response": f"{ANSWER}{seen}"}
                f.write(json.dumps(row) + "\n")


def without_carries(a: int, b: int) -> int:
    """What a sloppy pupil makes of a + b: the last digit of each column, 57 + 68 = 15."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def write_model(path: Path) -> None:
    """An untrained Qwen3 of 0.4 M parameters with a tokenizer of one token a character."""
    tokens = ["<pad>", "<eos>", *CHARACTERS, ANSWER]
    vocab = len(tokens) + len(tokens) % 2  # even, so that it can be split in two
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{ANSWER}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.Qwen3ForCausalLM(config).float().save_pretrained(path)


def warm_up(folder: Path, updates: int) -> None:
    """Supervised training of folder/untrained on folder/train.jsonl, into folder/model.

    Raises:
        DapoError: it failed; names its log.
    """
    recipe = {
        "model": {"path": str(folder / "untrained"), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 12},
        "algorithm": {"overlong_cache": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 20, "weight_decay": 0.0},
        "trainer": {"mini_batch_prompts": 1, "steps": updates},
        "actor": {"data_parallel_size": WARM_UP_RANKS},
    }
    (folder / "warm_up.yaml").write_text(json.dumps(recipe))
    arguments = [
        "--config", str(folder / "warm_up.yaml"), "--out", str(folder / "model"),
        "--updates", str(updates), "--batch", str(WARM_UP_BATCH),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    places = place_ranks(ActorConfig(data_parallel_size=WARM_UP_RANKS), [this_machine()])
    with interruptible() as check_interrupt, reserved_ports(1) as (port,), ProcessGroup(folder) as group:
        ranks = start_ranks(group, "warm_up", "dapo_megatron.trainer.warm_up", arguments, places, port, environment)
        wait_for_ranks(ranks, "the supervised warm-up", WARM_UP_DEADLINE_S, check_interrupt)
