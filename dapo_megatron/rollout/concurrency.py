"""Waiting for many at once."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_first_error(
    coroutines: Iterable[Coroutine[Any, Any, T]], finished: Callable[[int], None] = lambda _: None
) -> list[T]:
    """Results in order; at the first error the others are cancelled, and waited for, before it is raised.

    Args:
        finished: told how many have ended, whenever one does.
    """
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        for done, task in enumerate(asyncio.as_completed(tasks), start=1):
            await task
            finished(done)
    finally:
        for task in tasks:
            task.cancel()
        # What was cancelled ends in order: nothing of it is reported later, when nobody listens.
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]
