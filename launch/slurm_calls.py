"""SLURM's commands, with a deadline each."""

import os
import subprocess

from dapo_megatron.errors import ConfigError, DapoError

CALL_S = 60.0
"""For one answer of slurmctld."""


def slurm(*command: str, check: bool = True) -> str:
    """What one of SLURM's commands prints; times as Unix times.

    Raises:
        ConfigError: SLURM is not installed here.
        DapoError: it failed (with `check`), or slurmctld did not answer.
    """
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CALL_S, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not on PATH: SLURM's commands are needed inside its jobs") from None
    except subprocess.TimeoutExpired:
        raise DapoError(f"`{' '.join(command)}`: slurmctld did not answer within {CALL_S:g} s") from None
    if check and done.returncode:
        raise DapoError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[:300]}")
    return done.stdout
