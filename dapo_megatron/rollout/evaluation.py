"""avg@k on the held-out prompts: the mean accuracy of k sampled responses a prompt."""

import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from dapo_megatron.config import RunConfig
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.observe import catalog as m
from dapo_megatron.records import Group, Prompt
from dapo_megatron.rollout.concurrency import all_or_first_error
from dapo_megatron.rollout.reissue import until_finished

SampleGroup = Callable[[Prompt, int, SamplingParams, int], Coroutine[Any, Any, Group]]


async def evaluate(
    config: RunConfig, prompts: list[Prompt], training: SamplingParams, sample_group: SampleGroup
) -> dict[str, float]:
    """Accuracy on the held-out prompts, sampled and, if asked for, greedy.

    Args:
        training: how training samples; temperature and top_p are replaced by the evaluation's.
        sample_group: `sample_group(prompt, order, params, size)` generates and grades one group.
    """
    began, evaluation = time.monotonic(), config.evaluation

    async def finished(prompt: Prompt, order: int, params: SamplingParams, size: int) -> Group:
        make = partial(sample_group, prompt, order, params, size)
        return await until_finished(make, f"evaluation of prompt '{prompt.id}'", config.rollout.max_reissues)

    sampled = msgspec.structs.replace(training, temperature=evaluation.temperature, top_p=evaluation.top_p)
    metrics = {m.EVAL_ACCURACY: await _accuracy(prompts, sampled, evaluation.samples, finished)}
    if evaluation.greedy:
        greedy = msgspec.structs.replace(training, temperature=0.0)
        metrics[m.EVAL_GREEDY_ACCURACY] = await _accuracy(prompts, greedy, 1, finished)
    return metrics | {m.EVALUATE_SECONDS: time.monotonic() - began}


async def _accuracy(prompts: list[Prompt], params: SamplingParams, samples: int, sample_group: SampleGroup) -> float:
    groups = await all_or_first_error(sample_group(p, i, params, samples) for i, p in enumerate(prompts))
    verdicts = [r.verdict for g in groups for r in g.responses]
    return sum(v == "right" for v in verdicts) / len(verdicts)
