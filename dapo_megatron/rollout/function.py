"""A user's own rollout function."""

import inspect
from collections.abc import Awaitable, Callable

from dapo_megatron.errors import ConfigError
from dapo_megatron.records import Prompt, Response
from dapo_megatron.rollout.engine import Engine
from dapo_megatron.user_code import load_function

RolloutFunction = Callable[[Prompt, Engine], Awaitable[Response]]


def load_rollout(reference: str) -> RolloutFunction:
    """The function that "package.module:function" names.

    Raises:
        ConfigError: there is none that can be called with a prompt and an engine, or it is not `async def`.
    """
    function = load_function(reference, "rollout.function", "prompt", "engine")
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"rollout.function={reference} is not an 'async def' function(prompt, engine)")
    return function
