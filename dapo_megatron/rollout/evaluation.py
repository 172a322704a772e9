"""avg@k on the held-out prompts: the mean accuracy of k sampled responses a prompt."""

import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
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
    config: RunConfig, prompts: list[Prompt], training: SamplingParams, sample_group: SampleGroup, version: int
) -> dict[str, float]:
    """Accuracy on the held-out prompts, sampled and, if asked for, greedy.

    Args:
        training: how training samples; temperature and top_p are replaced by the evaluation's.
        sample_group: `sample_group(prompt, order, params, size)` generates and grades one group.
        version: the policy version that is measured. With a lag the next one may go live meanwhile: a push waits for
            no answer, and how much it has sampled is told.
    """
    began, evaluation = time.monotonic(), config.evaluation

    async def groups(params: SamplingParams, size: int) -> list[Group]:
        def finished(prompt: Prompt, order: int) -> Coroutine[Any, Any, Group]:
            make = partial(sample_group, prompt, order, params, size)
            return until_finished(make, f"evaluation of prompt '{prompt.id}'", config.rollout.max_reissues)

        return await all_or_first_error(finished(p, i) for i, p in enumerate(prompts))

    sampled = msgspec.structs.replace(training, temperature=evaluation.temperature, top_p=evaluation.top_p)
    wanted = {m.EVAL_ACCURACY: partial(groups, sampled, evaluation.samples)}
    if evaluation.greedy:
        wanted[m.EVAL_GREEDY_ACCURACY] = partial(groups, msgspec.structs.replace(training, temperature=0.0), 1)
    if config.rollout.max_policy_lag == 0:
        metrics = {name: accuracy(await make()) for name, make in wanted.items()}
        return metrics | {m.EVALUATE_SECONDS: time.monotonic() - began}
    # At once: training would wait for the longest answer of each in turn.
    found = await all_or_first_error(make() for make in wanted.values())
    metrics = {name: accuracy(made) for name, made in zip(wanted, found, strict=True)}
    other = other_version_share([group for made in found for group in made], version)
    return metrics | {m.EVAL_OTHER_VERSION: other, m.EVAL_SECONDS: time.monotonic() - began}


def accuracy(groups: Sequence[Group]) -> float:
    """Share of the responses that are right."""
    verdicts = [r.verdict for g in groups for r in g.responses]
    return sum(v == "right" for v in verdicts) / len(verdicts)


def other_version_share(groups: Sequence[Group], version: int) -> float:
    """Share of the sampled tokens that are of another policy version."""
    tokens = Counter[bool]()
    for span in (s for g in groups for r in g.responses for s in r.version_spans):
        tokens[span.version != version] += span.end - span.start
    return tokens[True] / tokens.total()
