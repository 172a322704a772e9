"""Functions that a user names in the config as package.module:function."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from dapo_megatron.errors import ConfigError


def load_function(reference: str, option: str, *parameters: str) -> Callable[..., Any]:
    """Import the function that `option` names.

    Args:
        parameters: what it will be called with, by position.

    Raises:
        ConfigError: not of that form, not importable, no function, or not callable with these parameters.
    """
    what = f"{option}={reference}"
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{what} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything at import; all of it is told in one line
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{what}: importing {module_name} failed ({reason}); is it installed, or its folder in PYTHONPATH?"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        names = sorted(n for n, value in vars(module).items() if callable(value) and n[0] != "_")
        raise ConfigError(f"{what}: {module_name} has no function {name}, only {names}")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as e:
        raise ConfigError(f"{what} cannot be called as {name}({', '.join(parameters)}): {e}") from None
    except ValueError:  # a function in C may have no signature that Python can read
        pass
    return function
