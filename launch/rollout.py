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
from collections.abc import Sequence
from pathlib import Path

import yaml

from dapo_megatron.config import RunConfig
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import EngineSet, Member, write_engine_set
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


def run_rollout(config: RunConfig, prompts: int, output: Path | None) -> int:
    """Generate and grade the groups of `prompts` prompts; returns the survey's exit code.

    Args:
        output: new file for the groups.

    Raises:
        ConfigError: it is there already, or this machine has too few GPUs.
        EngineError: no engine came up, or all have ended; with the end of a log.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    if output is not None and output.exists():
        raise ConfigError(f"--output {output} is there already: name a new file, or move it away")
    raise_open_files_limit(config.concurrency)
    with (
        tempfile.TemporaryDirectory() as place,
        interruptible() as check_interrupt,
        reserved_ports(ports_needed(config.engine.replicas, 0)) as ports,
    ):
        folder, keys = RunFolder(Path(place)), make_keys()
        write_keys(folder, keys)
        folder.config.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        places = place_engines(config.engine, [this_machine()], ports)
        write_engine_set(folder, EngineSet(1, tuple(Member(e.name, e.url) for e in places)))
        cpu = not places[0].devices
        shared = shared_environment(config, os.environ, cpu=cpu)
        with ProcessGroup(folder.path / "logs") as group:
            engines = {}
            for engine in places:
                command = command_of_engine(config, folder, engine, shared)
                child = group.start(command.name, command.arguments, command.environment, grace=False)
                engines[child.name] = (child, EngineControl(engine.url, 30.0, keys.engine_api_key))
            arguments = [] if output is None else ["--output", str(output)]
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "dapo_megatron.rollout.survey"]
                + ["--config", str(folder.config), "--prompts", str(prompts), *arguments],
                env=shared if cpu else shared | {VISIBLE: ""},
                start_new_session=True,  # Ctrl-C reaches this process alone
            )
            loading, deadline = dict(engines), time.monotonic() + config.engine.start_timeout_s
            while process.poll() is None:
                check_interrupt()
                for name, (child, control) in list(loading.items()):
                    if child.process.poll() is None and control.is_up():
                        control.set_version(0)
                        del loading[name]
                _require_some([child for child, _ in engines.values()])
                if loading.keys() == engines.keys() and time.monotonic() > deadline:
                    limit = f"engine.start_timeout_s={config.engine.start_timeout_s:g}"
                    raise EngineError(f"no engine answers within {limit} s{_end_of_log(child)}")
                time.sleep(POLL_S)
            return process.returncode


def _require_some(engines: Sequence[Child]) -> None:
    """Raise EngineError if none of them runs any more."""
    if all(child.process.poll() is not None for child in engines):
        code = engines[0].process.returncode
        raise EngineError(f"every engine has ended, {engines[0].name} with exit code {code}{_end_of_log(engines[0])}")


def _end_of_log(child: Child) -> str:
    return f"; the end of its log:\n{child.tail()}"
