"""avg@k on the held-out prompts: the mean accuracy of k sampled responses a prompt."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

from dapo_megatron.config import EvaluationConfig
from dapo_megatron.records import Group, Prompt
from dapo_megatron.rollout.engine import Sampling

SampleGroup = Callable[[Prompt, int, Sampling, int], Awaitable[Group]]


async def evaluate(
    config: EvaluationConfig, prompts: list[Prompt], training: Sampling, sample_group: SampleGroup
) -> dict[str, float]:
    """Accuracy on the held-out prompts, sampled and, if asked for, greedy.

    Args:
        training: how training samples; temperature and top_p are replaced by the evaluation's.
        sample_group: `sample_group(prompt, order, sampling, size)` generates and grades one group.
    """
    began = time.monotonic()
    sampled = msgspec.structs.replace(training, temperature=config.temperature, top_p=config.top_p)
    metrics = {"eval/accuracy": await _accuracy(prompts, sampled, config.samples, sample_group)}
    if config.greedy:
        greedy = msgspec.structs.replace(training, temperature=0.0)
        metrics["eval/greedy_accuracy"] = await _accuracy(prompts, greedy, 1, sample_group)
    return metrics | {"time/evaluate": time.monotonic() - began}


async def _accuracy(prompts: list[Prompt], sampling: Sampling, samples: int, sample_group: SampleGroup) -> float:
    groups = await asyncio.gather(*(sample_group(p, i, sampling, samples) for i, p in enumerate(prompts)))
    verdicts = [r.verdict for g in groups for r in g.responses]
    return sum(v == "right" for v in verdicts) / len(verdicts)
