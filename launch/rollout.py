"""Generate without a trainer: engines and one process that asks them, on this machine, in a folder that goes with them.

the engines     load the model folder's weights; each is called version 0 when it answers, and serves from then on
the survey      reads data, waits for an engine, generates, grades, prints (dapo_megatron/rollout/survey)
this process    waits for the survey, and looks after engines that do not come up, or that have all ended
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from dapo_megatron.config import RunConfig
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import EngineSet, Member, of_urls, write_engine_set
from dapo_megatron.errors import ConfigError, EngineError
from dapo_megatron.keys import make_keys, write_keys
from dapo_megatron.run_folder import RunFolder
from launch.commands import command_of_engine
from launch.environment import VISIBLE, shared_environment
from launch.machine import raise_open_files_limit, this_machine
from launch.port_map import ports_needed
from launch.ports import reserved_ports
from launch.processes import Child, ProcessGroup, interruptible
from launch.topology import place_engines

POLL_S = 0.25
CALL_S = 30.0
"""For one control call to an engine."""
UNNAMED = "default"
"""Version of an SGLang server that nobody has pushed to."""


def run_rollout(config: RunConfig, prompts: int, output: Path | None, urls: Sequence[str] = ()) -> int:
    """Generate and grade the groups of `prompts` prompts; returns the survey's exit code.

    Args:
        output: new file for the groups.
        urls: of engines that serve the model already, without an API key; none: they are started here.

    Raises:
        ConfigError: `output` is there already, this machine has too few GPUs, or an engine is of a run.
        EngineError: no engine came up, or all have ended; with the end of a log.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    if output is not None and output.exists():
        raise ConfigError(f"--output {output} is there already: name a new file, or move it away")
    if urls:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"replicas": len(urls)})})
    raise_open_files_limit(config.concurrency)
    cpu = this_machine().gpus == 0
    shared = shared_environment(config, os.environ, cpu=cpu)
    with tempfile.TemporaryDirectory() as place, interruptible() as check_interrupt:
        folder, keys = RunFolder(Path(place)), make_keys()
        write_keys(folder, keys)
        folder.config.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        with ProcessGroup(folder.path / "logs") as group:
            given = _given(folder, urls) if urls else _started(config, folder, group, keys.engine_api_key, shared)
            with given as look:
                arguments = [] if output is None else ["--output", str(output)]
                process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "dapo_megatron.rollout.survey"]
                    + ["--config", str(folder.config), "--prompts", str(prompts), *arguments],
                    env=shared if cpu else shared | {VISIBLE: ""},
                    start_new_session=True,  # Ctrl-C reaches this process alone
                )
                while process.poll() is None:
                    check_interrupt()
                    look()
                    time.sleep(POLL_S)
                return process.returncode


@contextmanager
def _given(folder: RunFolder, urls: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Engines of somebody else's; there is nothing to look after."""
    for url in urls:
        control = EngineControl(url, CALL_S)
        version = control.version()
        if version not in (UNNAMED, "0"):
            raise ConfigError(f"--engine {url} serves version {version} of a run's policy: name one that no run uses")
        control.set_version(0)
        control.close()
    write_engine_set(folder, of_urls(urls))
    yield lambda: None


@contextmanager
def _started(
    config: RunConfig, folder: RunFolder, group: ProcessGroup, key: str, shared: Mapping[str, str]
) -> Iterator[Callable[[], None]]:
    """Engines of our own; what is given names those version 0 that have come up, and raises if there is none."""
    with reserved_ports(ports_needed(config.engine.replicas, 0)) as ports:
        places = place_engines(config.engine, [this_machine()], ports)
        write_engine_set(folder, EngineSet(1, tuple(Member(e.name, e.url) for e in places)))
        engines: list[Child] = []
        loading: dict[str, EngineControl] = {}
        for place in places:
            command = command_of_engine(config, folder, place, shared)
            engines.append(group.start(command.name, command.arguments, command.environment, grace=False))
            loading[place.name] = EngineControl(place.url, CALL_S, key)
        deadline = time.monotonic() + config.engine.start_timeout_s

        def look() -> None:
            running = [child for child in engines if child.process.poll() is None]
            if not running:
                first = engines[0]
                what = f"every engine has ended, {first.name} with exit code {first.process.returncode}"
                raise EngineError(f"{what}; the end of its log:\n{first.tail()}")
            for child in running:
                if child.name in loading and loading[child.name].is_up():
                    loading.pop(child.name).set_version(0)
            if len(loading) == len(engines) and time.monotonic() > deadline:
                what = f"no engine answers within engine.start_timeout_s={config.engine.start_timeout_s:g} s"
                raise EngineError(f"{what}; the end of the log of {running[0].name}:\n{running[0].tail()}")

        yield look
