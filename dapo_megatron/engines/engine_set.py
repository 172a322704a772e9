"""Who serves now: the engines of a run, written by its launcher, followed by controller and trainer.

The generation rises whenever an engine is started. One that was started later than the trainer last pushed serves no
version of the run's policy until the next push.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from dapo_megatron.errors import ConfigError
from dapo_megatron.run_folder import RunFolder

TRIES, PAUSE_S = 3, 0.1


class Member(msgspec.Struct, frozen=True):
    """One start of one engine."""

    name: str
    url: str
    start: int = 1
    """Which start of the engine this is, from 1: the same URL may be another process."""


class EngineSet(msgspec.Struct, frozen=True):
    """All engines of a run at one time."""

    generation: int
    members: tuple[Member, ...]


def of_urls(urls: Sequence[str]) -> EngineSet:
    """Engines that nobody replaces."""
    return EngineSet(1, tuple(Member(f"engine-{i}", url) for i, url in enumerate(urls)))


def write_engine_set(folder: RunFolder, engines: EngineSet) -> None:
    """Replace the run's engine set, all at once."""
    aside = folder.engine_set.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(engines))
    os.replace(aside, folder.engine_set)


def read_engine_set(folder: RunFolder) -> EngineSet:
    """The run's engine set.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    for _ in range(TRIES - 1):
        with suppress(OSError):  # another node replaces it at this moment
            return _decoded(folder)
        time.sleep(PAUSE_S)
    try:
        return _decoded(folder)
    except OSError as e:
        raise ConfigError(f"{folder.engine_set} cannot be read ({e}): the launcher writes it") from None


def _decoded(folder: RunFolder) -> EngineSet:
    try:
        return msgspec.json.decode(folder.engine_set.read_bytes(), type=EngineSet)
    except msgspec.MsgspecError as e:
        raise ConfigError(f"{folder.engine_set} cannot be read ({e}): the launcher writes it") from None
