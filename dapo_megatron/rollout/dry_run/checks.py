"""Read every row, import a user's functions and grade some ground truths: the controller's work without engines."""

import asyncio

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from dapo_megatron.config import RunConfig
from dapo_megatron.data.prompts import LoadedPrompts, load_prompts
from dapo_megatron.data.tokenizer import check_tags, load_tokenizer
from dapo_megatron.errors import ConfigError, DataError
from dapo_megatron.grading.pool import DEFAULT_GRADER, GradingPool, grading_pool
from dapo_megatron.records import Prompt
from dapo_megatron.rollout.function import load_rollout


def dry_run(config: RunConfig, console: Console) -> None:
    """One line for each thing that was looked at.

    Raises:
        ConfigError: tokenizer, grader, rollout function or template cannot work.
        DataError: a bad file or row; or the built-in grader finds a ground truth unequal to itself.
    """
    asyncio.run(_check(config, console))


async def _check(config: RunConfig, console: Console) -> None:
    load_rollout(config.rollout.function)
    console.print(f"rollout.function={config.rollout.function}: can be called", markup=False)
    seen: set[str] = set()
    data, tokenizer = config.data, load_tokenizer(config.model.path)
    check_tags(tokenizer, config.grading.thinking)
    async with grading_pool(config) as grading:
        for name, paths, limit in (("data.train", data.train, None), ("data.eval", data.eval, data.eval_limit)):
            if paths is None:
                console.print(f"{name}: none")
                continue
            loaded = _read(config, name, paths, limit, tokenizer, console)
            console.print(
                f"{name}: {len(loaded.prompts)} prompts, {loaded.dropped} dropped, longest {loaded.longest} tokens "
                f"(data.max_prompt_tokens={data.max_prompt_tokens})"
            )
            verdicts = await _grade_truths(config, name, loaded.prompts, grading)
            seen |= set(verdicts)
            console.print(f"{name}: ground truths graded against themselves: {', '.join(verdicts)}")
        if grading.trouble:
            if seen == {"unknown"}:
                raise ConfigError(
                    f"grading.grader={config.grading.grader} has no verdict on anything: {grading.trouble}"
                )
            console.print(f"grading: {grading.trouble}", markup=False)


def _read(
    config: RunConfig,
    name: str,
    paths: list[str],
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> LoadedPrompts:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return load_prompts(paths, config.data, tokenizer, limit=limit, progress=progress)


async def _grade_truths(config: RunConfig, name: str, prompts: list[Prompt], grading: GradingPool) -> list[str]:
    """Verdicts on the ground truths of the first, the middle and the last prompt, each as a response to itself."""
    verdicts: list[str] = []
    for index in sorted({0, len(prompts) // 2, len(prompts) - 1}):
        prompt = prompts[index]
        for truth in (prompt.ground_truth, *prompt.alternatives):
            verdict = await grading.grade(_response(config, truth), truth)
            if verdict != "right" and _built_in(config):
                raise DataError(
                    f"{name}, prompt {prompt.id}: its ground truth {truth[:100]!r} is graded {verdict} against itself; "
                    "cut the answer out of the field by data.answer_pattern, or set grading.grader"
                )
            verdicts.append(verdict)
    return verdicts


def _response(config: RunConfig, truth: str) -> str:
    """A response whose answer is the truth; a user's grader, whose form of answers is unknown, gets the truth."""
    thought = config.grading.thinking[1] if config.grading.thinking else ""
    if not _built_in(config):
        return thought + truth
    return thought + (f"\\boxed{{{truth}}}" if config.data.template == "boxed" else f"Answer: {truth}")


def _built_in(config: RunConfig) -> bool:
    return config.grading.grader in (None, DEFAULT_GRADER)
