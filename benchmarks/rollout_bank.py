"""What the rollout bank costs the controller, and what it gives back.

    python -m benchmarks.rollout_bank                                  # 512 groups of 16 responses, 1,000 tokens each
    python -m benchmarks.rollout_bank --groups 64 --tokens 5000

A step's responses pass through the controller's own parts: reply of the engine decoded, text, checks of the rollout
function, scores, bank, and the batch at the end. Graders and waiting are left out, so that the share is the highest
that it can be. Then a bank that was left by a kill is opened, and every group taken back.
"""

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.batching.wire import encode
from dapo_megatron.config import RunConfig
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.engines.wire import SamplingParams, decode_completions
from dapo_megatron.records import Group, Prompt
from dapo_megatron.rollout import single_turn
from dapo_megatron.rollout.bank import RolloutBank, responses_digest
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.rollout.guard import GuardedRollout
from dapo_megatron.rollout.scoring import score_group
from dapo_megatron.run_folder import RunFolder
from launch.demo import write_model

VOCAB = 16
SIZE = 16
DISTINCT = 64
"""Replies that the groups share: making them is not what is timed."""


class Replies:
    """Stands for the engines: one of some replies, decoded as the client does."""

    def __init__(self, tokens: int):
        rng = random.Random(0)
        self._replies = [self._reply(rng, rng.randint(tokens // 2, tokens * 3 // 2)) for _ in range(DISTINCT)]
        self._next = 0

    def _reply(self, rng: random.Random, count: int) -> bytes:
        sampled = [(-rng.expovariate(1.0), rng.randrange(2, VOCAB), None) for _ in range(count)]
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": sampled, "weight_version": "7"}
        return msgspec.json.encode({"meta_info": meta})

    async def generate(self, input_ids: list[int], params: SamplingParams):
        self._next += 1
        (completion,) = decode_completions(self._replies[self._next % DISTINCT], "engine")
        return completion


def main() -> None:
    """Print the seconds of each part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_bank", description=__doc__)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1000, help="mean tokens of a response")
    parser.add_argument("--folder", type=Path, help="where the bank is written; default: a temporary folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        asyncio.run(_measure(folder, args.groups, args.tokens))
    finally:
        shutil.rmtree(folder)


async def _measure(folder: Path, count: int, tokens: int) -> None:
    write_model(folder / "model")
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": "-"},
            "rollout": {"prompts_per_step": count, "group_size": SIZE},
            "trainer": {"mini_batch_prompts": count},
        }
    )
    seconds: Counter[str] = Counter()

    @contextmanager
    def timed(part: str):
        began = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - began

    bank = RolloutBank(RunFolder(folder), responses_digest(config), 1 << 40, None)
    bank.begin_step(1, range(7, 8))
    function, replies = GuardedRollout(single_turn.rollout, config.rollout, VOCAB), Replies(tokens)
    params, tokenizer = SamplingParams(config.rollout.max_response_tokens), load_tokenizer(config.model.path)
    groups, slowest = [], 0.0
    for order in range(count):
        prompt = Prompt(f"p{order}", [2] * 100, "4", "2 + 2?", order)
        with timed("replies, text, checks"):
            responses = [await function(prompt, Engine(replies, tokenizer, params, i)) for i in range(SIZE)]
        for i, response in enumerate(responses):
            response.verdict = "right" if i % 3 else "wrong"
        with timed("scores"):
            groups.append(score_group(Group(order, prompt, responses), config))
        before = seconds["bank"]
        with timed("bank"):
            bank.add(groups[-1])
        slowest = max(slowest, seconds["bank"] - before)
    with timed("batch"):
        rules = packing_rules(config)
        encode(
            build_step_batch(
                groups, step=1, version=7, seed=0, mini_batch_groups=count, aggregation="token", rules=rules
            )
        )
    busy, size = sum(seconds.values()), RunFolder(folder).bank(1).stat().st_size
    bank.close()

    began = time.perf_counter()
    bank = RolloutBank(RunFolder(folder), responses_digest(config), 1 << 40, 0)
    bank.begin_step(1, range(7, 8))
    opened = time.perf_counter() - began
    assert all(bank.take(g.order, g.prompt) == g for g in groups)

    table = Table("part of the controller's work", "seconds", "share", title=f"{count * SIZE} responses")
    for part, spent in seconds.items():
        table.add_row(part, f"{spent:.3f}", f"{spent / busy:.1%}")
    console = Console()
    console.print(table)
    total = sum(len(r.token_ids) for g in groups for r in g.responses)
    console.print(
        f"{total} tokens, {size / 1e6:.0f} MB ({size / total:.1f} bytes a token); the slowest group held the event "
        f"loop for {slowest * 1e3:.1f} ms; a resume opens the bank in {opened:.2f} s"
    )


if __name__ == "__main__":
    main()
