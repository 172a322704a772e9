"""A real model in bfloat16, over two pipeline stages: what is pushed rightly passes, and what is not is named."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import LAYOUTS
from tests.engine.conftest import ENGINE, serve
from tests.tiny import run_config

from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.errors import EngineError
from dapo_megatron.resharding import push
from dapo_megatron.resharding.checksums import engine_parameter
from dapo_megatron.resharding.verify import Verifier

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2"
TEXTS = [
    "The capital of France is",
    "Question: A farmer has 12 cows and buys 5 more. How many cows does he have? Answer:",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea, there lived",
]
LAYER_OF_STAGE = (4, 22)
PUSHES = 20 if os.environ.get("LAYOUTS") == "all" else 5


def config_of(path):
    return run_config(
        path,
        model={"path": str(path), "dtype": "bfloat16"},
        actor=LAYOUTS["pp2"],
        engine=ENGINE,
        rollout={"max_response_tokens": 64},
        resharding={"bucket_mib": 16},
        trainer={"collective_timeout_s": 240},
    )


def nudge(actor, version):
    """Change all weights a little; the two copies of a tied embedding alike."""
    with torch.no_grad():
        for module in actor.modules:
            for p in module.parameters():
                generator = torch.Generator().manual_seed(version * 1000 + p.numel() % 997)
                p.add_(0.003 * p.float().std() * torch.randn(p.shape, generator=generator))


@contextmanager
def on_the_way(scaled=None, swapped=()):
    """Of what is pushed in the block, one tensor is 5 % too large, or two have changed places."""
    fill, receive = push.fill, EngineControl.receive_tensors
    other = dict([swapped, swapped[::-1]] if swapped else [])

    def scaling(bucket, tensors, device):
        return fill(bucket, ((n, t * 1.05 if n == scaled else t) for n, t in tensors), device)

    def swapping(engine, group, names, *args, **options):
        return receive(engine, group, [other.get(n, n) for n in names], *args, **options)

    push.fill, EngineControl.receive_tensors = scaling, swapping
    yield
    push.fill, EngineControl.receive_tensors = fill, receive


def faults():
    for layer in LAYER_OF_STAGE:
        attention = f"model.layers.{layer}.self_attn."
        yield {"scaled": attention + "k_proj.weight"}
        yield {"swapped": (attention + "q_proj.weight", attention + "o_proj.weight")}


def run(config, url, prompts):
    """(what each right push measured; of each wrong one the fault and the error)."""
    actor = actor_on_rank(config)
    pusher = push.Pusher(config, actor, lambda: of_urls([url]))
    verifier = Verifier(config, actor, pusher, prompts)
    pusher.connect()
    verifier.prime()
    right, wrong = [], []
    for version in range(1, PUSHES + 1):
        nudge(actor, version)
        right.append(pusher.push(version) | verifier.verify(version))
    for version, fault in enumerate(faults(), PUSHES + 1):
        with on_the_way(**fault):
            pusher.push(version)
        try:
            verifier.verify(version)
            wrong.append((fault, None))
        except EngineError as e:
            wrong.append((fault, str(e)))
    pusher.push(100)
    right.append(verifier.verify(100))
    pusher.close()
    return right, wrong


@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"no {SMOLLM2}: python tools/fetch_smollm2.py models/smollm2")
def test_right_pushes_pass_and_one_wrong_tensor_is_named(tmp_path):
    config, tokenizer = config_of(SMOLLM2), AutoTokenizer.from_pretrained(SMOLLM2)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    with serve(SMOLLM2, tmp_path / "logs", dtype="bfloat16") as (url, _):
        (right, wrong), _ = run_ranks(2, run, config, url, prompts, deadline_s=840)
    for found in right:
        assert found["sync/checksums"] == 30 * 6 + 2 and 0 < found["sync/logprob_difference_mean"] < 0.1
    assert len(right) == PUSHES + 1 and len(wrong) == 4
    for fault, message in wrong:
        named = [engine_parameter(name) for name in (fault.get("swapped") or [fault["scaled"]])]
        assert message is not None and f"in {len(set(named))} of" in message
        assert all(name in message for name in named) and url in message
