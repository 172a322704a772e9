"""Generates the groups that a training's first steps would be issued, under the weights that the engines serve.

Prompts, their order and numbers, rollout function, sampling, grader and scoring are the training's own: the
controller's. The engines serve version 0, as at the beginning of a run.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.coalescing import CoalescingClient
from dapo_megatron.engines.engine_set import read_engine_set
from dapo_megatron.grading.pool import grading_pool
from dapo_megatron.keys import read_keys
from dapo_megatron.observe.jsonl import append_line
from dapo_megatron.observe.samples import group_row
from dapo_megatron.process import Reporter
from dapo_megatron.records import Prompt, ScoredGroup
from dapo_megatron.rollout.controller import Controller
from dapo_megatron.rollout.producer import QUEUED
from dapo_megatron.rollout.reissue import until_finished
from dapo_megatron.rollout.survey.tally import Tally
from dapo_megatron.run_folder import RunFolder

LINE_S = 10.0
"""Between two lines of progress, where no terminal shows a bar."""


def survey(config_path: Path, prompts: int, output: Path | None, console: Console) -> None:
    """Generate, grade, and print a table.

    Args:
        prompts: groups to generate; at most one for each prompt of the data.
        output: new file for the groups, one a line (observe.samples), as they are finished.

    Raises:
        DapoError: data, functions or engines cannot be used.
    """
    asyncio.run(_survey(load_config(config_path), RunFolder(config_path.parent), prompts, output, console))


async def _survey(config: RunConfig, folder: RunFolder, prompts: int, output: Path | None, console: Console) -> None:
    with Reporter(folder, "controller") as reporter:
        async with (
            grading_pool(config) as grading,
            EngineClient(
                lambda: read_engine_set(folder),
                concurrency=config.concurrency,
                timeout_s=config.deadlines.request,
                silence_s=config.deadlines.engine,
                api_key=read_keys(folder).engine_api_key,
            ) as client,
        ):
            controller = Controller(config, reporter, CoalescingClient(client), grading)
            issued = first_prompts(config, controller.prompts.prompts, prompts)
            console.print("waiting for an engine that has loaded the model")
            await client.until_one_serves(config.engine.start_timeout_s)
            tally, began = Tally(config), time.monotonic()
            with shown(tally, len(issued), console) as show:
                async for group in generated(controller, issued):
                    tally.add(group)
                    if output is not None:
                        append_line(output, group_row(0, group))
                    show()
    console.print(table(config, tally, time.monotonic() - began))
    if grading.trouble:
        console.print(f"grading: {grading.trouble}", markup=False)


def first_prompts(config: RunConfig, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Those that a training would be issued first, in its order."""
    sampler = PromptSampler(len(prompts), config.seed, config.data.shuffle)
    return [prompts[sampler.next()] for _ in range(min(count, len(prompts)))]


async def generated(controller: Controller, prompts: Sequence[Prompt]) -> AsyncIterator[ScoredGroup]:
    """A group of each prompt, as they are finished; as many are with the engines as in a training."""
    config = controller.config
    room = asyncio.Semaphore(math.ceil(QUEUED * config.concurrency / config.rollout.group_size))

    async def make(order: int, prompt: Prompt) -> ScoredGroup:
        async with room:
            what = f"group {order} (prompt '{prompt.id}')"
            return await until_finished(
                partial(controller.make_group, prompt, order), what, config.rollout.max_reissues
            )

    tasks = [asyncio.create_task(make(order, prompt)) for order, prompt in enumerate(prompts)]
    try:
        for finished in asyncio.as_completed(tasks):
            yield await finished
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def shown(tally: Tally, total: int, console: Console) -> Iterator[Callable[[], None]]:
    """Progress: a bar on a terminal, elsewhere a line now and then; to be called when something was added."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, began, last = bar.add_task("groups", total=total), time.monotonic(), 0.0

        def show() -> None:
            nonlocal last
            now = time.monotonic()
            speed = tally.tokens / (now - began)
            text = f"accuracy {tally.accuracy:.1%}, {tally.outcomes['mixed']} mixed, {speed:.0f} tokens/s"
            bar.update(task, completed=tally.groups, description=text)
            if not console.is_terminal and now - last >= LINE_S:
                last = now
                console.print(f"{tally.groups}/{total} groups, {text}")

        yield show


def table(config: RunConfig, tally: Tally, seconds: float) -> Table:
    """The report."""
    found = Table("", "", title=Text(f"{config.model.path} on {', '.join(config.data.train)}"), show_header=False)
    for name, value in tally.rows(seconds):
        found.add_row(name, value)
    return found
