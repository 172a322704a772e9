"""What the engines did not finish is issued again: an engine fails, the run does not."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dapo_megatron.engines.client import Unanswered

T = TypeVar("T")
log = logging.getLogger(__name__)


async def until_finished(
    make: Callable[[], Awaitable[T]], what: str, reissues: int, again: Callable[[], None] = lambda: None
) -> T:
    """What `make` makes, called again whenever the engines leave one of its requests unanswered.

    Args:
        what: is made, for messages: "group 12 (prompt 'train.jsonl:7')".
        reissues: most calls beside the first.
        again: called before each of those.

    Raises:
        Unanswered: the last call failed like the others.
    """
    for left in reversed(range(reissues + 1)):
        try:
            return await make()
        except Unanswered as e:
            if not left:
                times = f"{reissues + 1} times (rollout.max_reissues={reissues})"
                raise Unanswered(f"{what} was issued {times}, and not finished: {e}") from None
            log.warning("%s is issued again: %s", what, e)
            again()
    raise AssertionError("unreachable")
