"""What the rollout bank costs the controller, and what it gives back.

    python -m benchmarks.rollout_bank                                  # 512 groups of 16 responses, 1,000 tokens each
    python -m benchmarks.rollout_bank --groups 64 --tokens 5000

The groups of a step pass through the controller's own parts: HTTP to an engine that answers at once (a process of its
own), decoding, text, checks of the rollout function, verdicts of the built-in grader, scores, bank, and the batch at
the end. Time is the controller's CPU time: what it waits in a real run would only make the bank's share smaller. Then a
bank that was left by a kill is opened, and every group taken back.
"""

import argparse
import asyncio
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from aiohttp import web
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.config import RunConfig
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.grading.pool import GradingPool
from dapo_megatron.records import Group, Prompt, Response, ScoredGroup
from dapo_megatron.rollout import single_turn
from dapo_megatron.rollout.bank import RolloutBank, responses_digest
from dapo_megatron.rollout.concurrency import all_or_first_error
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.rollout.guard import GuardedRollout
from dapo_megatron.rollout.scoring import score_group
from dapo_megatron.rollout.served import ServedBatch
from dapo_megatron.run_folder import RunFolder
from launch.demo import write_model
from launch.ports import LOCALHOST, reserved_ports

VOCAB = 16
SIZE = 16
DISTINCT = 64
"""Replies that the groups share: making them is not what is timed."""


def main() -> None:
    """Print the seconds of each part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_bank", description=__doc__)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1000, help="mean tokens of a response")
    parser.add_argument("--folder", type=Path, help="where the bank is written; default: a temporary folder")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        _serve(args.serve, args.tokens)
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    with reserved_ports(1) as (port,):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.rollout_bank", "--serve", str(port)]
        server = subprocess.Popen([*command, "--tokens", str(args.tokens)])
        try:
            asyncio.run(_measure(folder, args.groups, f"http://{LOCALHOST}:{port}"))
        finally:
            server.kill()
            server.wait()
            shutil.rmtree(folder)


def _serve(port: int, tokens: int) -> None:
    """An engine that answers every request at once with one of some replies."""
    rng, next_one = random.Random(0), 0
    replies = [_reply(rng, rng.randint(tokens // 2, tokens * 3 // 2)) for _ in range(DISTINCT)]

    async def generate(_: web.Request) -> web.Response:
        nonlocal next_one
        next_one += 1
        return web.Response(body=replies[next_one % DISTINCT], content_type="application/json")

    async def model_info(_: web.Request) -> web.Response:
        return web.json_response({"weight_version": "0"})

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_get("/model_info", model_info)
    web.run_app(app, host=LOCALHOST, port=port, print=None, reuse_port=True)


def _reply(rng: random.Random, count: int) -> bytes:
    sampled = [(-rng.expovariate(1.0), rng.randrange(2, VOCAB), None) for _ in range(count)]
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": sampled, "weight_version": "7"}
    return msgspec.json.encode({"meta_info": meta})


async def _measure(folder: Path, count: int, url: str) -> None:
    write_model(folder / "model")
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": "-"},
            "rollout": {"prompts_per_step": count, "group_size": SIZE},
            "trainer": {"mini_batch_prompts": count},
        }
    )
    digest, run = responses_digest(config), RunFolder(folder)
    bank = RolloutBank(run, digest, 1 << 40, 0)
    bank.begin_step(1, range(7, 8))
    function = GuardedRollout(single_turn.rollout, config.rollout, VOCAB)
    params, tokenizer = SamplingParams(config.rollout.max_response_tokens), load_tokenizer(config.model.path)
    prompts = [Prompt(f"p{order}", [2] * 100, "4", "2 + 2?", order) for order in range(count)]
    added: list[float] = []

    async def respond(prompt: Prompt, sample: int) -> Response:
        response = await function(prompt, Engine(sampler, tokenizer, params, sample))
        response.verdict = await grading.grade(response.text, prompt.ground_truth)
        return response

    async def group(prompt: Prompt) -> ScoredGroup:
        responses = await all_or_first_error(respond(prompt, i) for i in range(SIZE))
        scored = score_group(Group(prompt.row, prompt, responses), config)
        began = time.thread_time()
        bank.add(scored)
        added.append(time.thread_time() - began)
        return scored

    async with (
        GradingPool(None, 1, 10.0, 1024) as grading,
        EngineClient(lambda: of_urls([url]), concurrency=config.concurrency, timeout_s=600) as client,
    ):
        sampler = CoalescingClient(client)
        await group(prompts[0])  # the server is up
        bank.begin_step(1, range(7, 8))
        added.clear()
        began = time.process_time()
        groups = await all_or_first_error(map(group, prompts))
        generated = time.process_time() - began
        rules = packing_rules(config)
        batch = build_step_batch(
            groups, step=1, version=7, seed=0, mini_batch_groups=count, aggregation="token", rules=rules
        )
        for data in ServedBatch(batch).all_encoded():
            del data
        busy = time.process_time() - began
    bank.close()

    began = time.perf_counter()
    bank = RolloutBank(run, digest, 1 << 40, 0)
    bank.begin_step(1, range(7, 8))
    opened = time.perf_counter() - began
    assert all(bank.take(g.order, g.prompt) is not None for g in groups)

    table = Table("the controller's CPU time", "seconds", "share", title=f"{count * SIZE} responses")
    parts = {"responses": generated - sum(added), "bank": sum(added), "batch": busy - generated}
    for part, spent in parts.items():
        table.add_row(part, f"{spent:.2f}", f"{spent / busy:.1%}")
    console = Console()
    console.print(table)
    total, size = sum(len(r.token_ids) for g in groups for r in g.responses), run.bank(1).stat().st_size
    console.print(
        f"{total} tokens, {size / 1e6:.0f} MB ({size / total:.1f} bytes a token); the event loop was held for "
        f"{max(added) * 1e3:.1f} ms at most; a resume opens the bank in {opened:.2f} s"
    )


if __name__ == "__main__":
    main()
