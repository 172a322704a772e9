"""What a resume changes of a run's configuration, and what it must not change. Pure."""

import os
from dataclasses import dataclass
from typing import Any

import xxhash

from dapo_megatron.config.explain import fields, value_of
from dapo_megatron.config.run import RunConfig
from dapo_megatron.errors import ConfigError

FIXED = ("seed", "model.", "data.")
"""What the weights, and the order of the prompts, follow from."""
FREE = ("data.eval", "data.eval_limit")


@dataclass(frozen=True)
class Change:
    """One option that a resumed run has otherwise than the run began with."""

    option: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.option}: {self.before} -> {self.now}"


def changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """Options that differ.

    Raises:
        ConfigError: names the first one that a resume must not change.
    """
    pairs = [(name, value_of(before, name), value_of(now, name)) for name, _, _ in fields()]
    found = [Change(name, old, new) for name, old, new in pairs if _place(name, old) != _place(name, new)]
    for change in found:
        if change.option.startswith(FIXED) and change.option not in FREE:
            raise ConfigError(
                f"a resume cannot change {change.option} from {change.before} to {change.now}: give the value that the "
                "run began with, or start a new run (--resume-weights-only takes the weights along)"
            )
    return found


def _place(option: str, value: Any) -> Any:
    """A path in one of its spellings; other values as they are."""
    if option in ("run_dir", "model.path"):
        return os.path.abspath(value)
    return [os.path.abspath(path) for path in value] if option == "data.train" else value


def config_digest(config: RunConfig) -> str:
    """Hash of the whole configuration, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(config.model_dump_json().encode())
