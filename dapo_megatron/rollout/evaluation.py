"""avg@k on the held-out prompts: the mean accuracy of k sampled responses a prompt."""

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from dapo_megatron.records import Group

if TYPE_CHECKING:
    from dapo_megatron.rollout.controller import Controller


async def evaluate(controller: "Controller") -> dict[str, float]:
    """Sample the held-out prompts with evaluation.temperature and top_p, and greedily if evaluation.greedy."""
    config, began = controller.config.evaluation, time.monotonic()
    sampled = msgspec.structs.replace(controller.sampling, temperature=config.temperature, top_p=config.top_p)
    metrics = {"eval/accuracy": await _accuracy(controller, sampled, config.samples)}
    if config.greedy:
        greedy = msgspec.structs.replace(controller.sampling, temperature=0.0)
        metrics["eval/greedy_accuracy"] = await _accuracy(controller, greedy, 1)
    return metrics | {"time/evaluate": time.monotonic() - began}


async def _accuracy(controller: "Controller", sampling, samples: int) -> float:
    groups: list[Group] = await asyncio.gather(
        *(controller.sample_group(p, i, sampling, samples) for i, p in enumerate(controller.held_out.prompts))
    )
    verdicts = [r.verdict for g in groups for r in g.responses]
    return sum(v == "right" for v in verdicts) / len(verdicts)
