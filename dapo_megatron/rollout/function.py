"""Loading a user's own rollout function."""

import importlib
import inspect
from collections.abc import Awaitable, Callable

from dapo_megatron.errors import ConfigError
from dapo_megatron.records import Prompt, Response
from dapo_megatron.rollout.engine import Engine

RolloutFunction = Callable[[Prompt, Engine], Awaitable[Response]]


def load_rollout(reference: str) -> RolloutFunction:
    """Import `package.module:function`.

    Raises:
        ConfigError: no such module or function, or it is not `async def`.
    """
    module_name, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(
            f"rollout.function={reference} cannot be imported ({e}): write package.module:function"
        ) from None
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"rollout.function={reference} is not an 'async def' function(prompt, engine)")
    return function
