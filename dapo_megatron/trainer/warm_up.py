"""Supervised training with the project's own actor, data-parallel: what the demo's model starts from.

    python -m dapo_megatron.trainer.warm_up --config CONFIG --out FOLDER --updates 250 --batch 256

Reads data.train of the config, whose rows hold `response` besides the prompt, and writes a Hugging Face folder.
"""

import argparse
import random
import shutil
from dataclasses import replace
from pathlib import Path

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

import transformers
from safetensors.torch import save_file

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import SupervisedObjective
from dapo_megatron.batching.batch import MicroBatch
from dapo_megatron.batching.build import shard_samples
from dapo_megatron.batching.sample import TrainingSample
from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.data.rows import load_rows
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.errors import DapoError, exit_code
from dapo_megatron.observe import catalog as m
from dapo_megatron.process import leave
from dapo_megatron.weights.exporter import export_stage
from dapo_megatron.weights.hf_config import read_model


def main() -> int:
    """Train and save; 1 after an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.trainer.warm_up", description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--updates", required=True, type=int)
    parser.add_argument("--batch", required=True, type=int, help="examples an update")
    return exit_code(lambda: _warm_up(parser.parse_args()))


def _warm_up(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    if config.world_size != config.actor.data_parallel_size or config.actor.expert_model_parallel_size > 1:
        raise DapoError("the warm-up runs data-parallel only: leave the other parallel sizes at 1")
    shape = read_model(config.model.path)
    layout = init_parallel(config)
    actor = Actor(config, shape, layout)
    actor.load_hf(config.model.path)
    examples = supervised_samples(config)
    if len(examples) < args.batch:
        raise DapoError(f"--batch {args.batch}: data.train has only {len(examples)} rows")
    for update in range(1, args.updates + 1):
        shards = supervised_shards(config, examples, update, args.batch)
        metrics = actor.update(shards[layout.dp_rank], SupervisedObjective(), None)
        if update % 25 == 0 and layout.rank == 0:
            print(f"update {update}/{args.updates} loss {metrics[m.LOSS]:.3f}", flush=True)
    if layout.rank == 0:
        _save(actor, Path(config.model.path), args.out)


def supervised_samples(config: RunConfig) -> list[TrainingSample]:
    """One sample for each row; the end token is part of the response. Weights are those of one sample alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
    samples = []
    for i, row in enumerate(load_rows(config.data.train)):
        prompt = tokenizer(row.value("prompt"), add_special_tokens=False)["input_ids"]
        response = [*tokenizer(row.value("response"), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        n = len(response)
        samples.append(TrainingSample(prompt + response, len(prompt), [True] * n, [0.0] * n, 0.0, 1 / n, (str(i), 0)))
    return samples


def supervised_shards(
    config: RunConfig, samples: list[TrainingSample], update: int, size: int
) -> list[list[MicroBatch]]:
    """A random choice of `size` samples, one shard for each data-parallel rank; every token has the same weight."""
    chosen = random.Random(f"{config.seed}/{update}").sample(samples, size)
    tokens = sum(len(sample.loss_mask) for sample in chosen)
    return shard_samples([replace(sample, weight=1 / tokens) for sample in chosen], packing_rules(config))


def _save(actor: Actor, source: Path, out: Path) -> None:
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in export_stage(actor.modules, actor.shape)}
    save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)


if __name__ == "__main__":
    leave(main())
