"""SLURM's commands, with a deadline each."""

import os
import subprocess
import time

from dapo_megatron.errors import ConfigError, DapoError

CALL_S = 60.0
"""For one answer of slurmctld."""
PAUSE_S = 5.0


def slurm(*command: str, check: bool = True, tries: int = 3, call_s: float = CALL_S) -> str:
    """What one of SLURM's commands prints; times as Unix times.

    Args:
        tries: slurmctld may be away for a while.
        call_s: seconds for each.

    Raises:
        ConfigError: SLURM is not installed here.
        DapoError: it failed (with `check`), or slurmctld did not answer.
    """
    for _ in range(tries - 1):
        try:
            return _called(command, check, call_s)
        except ConfigError:
            raise
        except DapoError:
            time.sleep(PAUSE_S)
    return _called(command, check, call_s)


def _called(command: tuple[str, ...], check: bool, call_s: float) -> str:
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=call_s, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not on PATH: SLURM's commands are needed inside its jobs") from None
    except subprocess.TimeoutExpired:
        raise DapoError(f"`{' '.join(command)}`: slurmctld did not answer within {call_s:g} s") from None
    if check and done.returncode:
        raise DapoError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[:300]}")
    return done.stdout
