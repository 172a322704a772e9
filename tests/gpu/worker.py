"""One update of one model in one precision, in a process of its own; what it did goes to a file.

    python -m tests.gpu.worker JOB.json OUT.pt

JOB holds the sections of the config that differ from tests/tiny.py and the model's folder.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

import torch

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.training_objective import SupervisedObjective
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.actor.precision import require_precision
from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.weights.exporter import export_stage
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.importer import named_parameters
from launch.ports import reserved_ports
from tests.tiny import groups, packed_batch, run_config


def run(job: dict) -> dict:
    """Loss, log-probs before and after, gradients, the layers that ran in FP8, and the exported weights."""
    config = run_config(Path(job["path"]), **job["sections"])
    shape = read_model(job["path"])
    require_precision(config, shape)
    actor = Actor(config, shape, init_parallel(config))
    actor.load_hf(job["path"])
    shard = batch(config, shape.vocab)
    before = torch.cat([values.cpu() for values in actor.logprobs(shard)])
    gradients = {}
    step = actor.optimizer.step

    def step_with_snapshot():
        # Before the step: a gather of MXFP8 weights goes through the gradients' buffer.
        parameters = named_parameters(actor.modules, shape)
        gradients.update({name: p.main_grad.detach().float().cpu().clone() for name, p in parameters.items()})
        return step()

    actor.optimizer.step = step_with_snapshot
    metrics = actor.update(shard, SupervisedObjective(), None)
    return {
        "metrics": metrics,
        "logprobs": before,
        "after": torch.cat([values.cpu() for values in actor.logprobs(shard)]),
        "gradients": gradients,
        "fp8_modules": sorted(n for n, m in actor.modules[0].named_modules() if getattr(m, "fp8", False) is True),
        "weights": {name: tensor.detach().cpu().clone() for name, tensor in export_stage(actor.modules, shape)},
    }


def batch(config, vocab: int) -> list:
    """A shard of packed micro-batches, padded as the precision asks."""
    made = packed_batch(
        groups(n=8, size=8, vocab=vocab),
        step=1,
        version=0,
        seed=0,
        mini_batch_groups=8,
        aggregation="token",
        rules=dataclasses.replace(packing_rules(config), micro_batch_tokens=512),
    )
    return made.mini_batches[0].shards[0]


if __name__ == "__main__":
    with reserved_ports(1) as (port,):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        torch.save(run(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2])
