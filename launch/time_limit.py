"""Whether a SLURM job's time limit leaves room for work, and for saving before it when somebody tells of it. Pure."""

import re

from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.errors import ConfigError

SIGNAL = re.compile(r"(?P<to>[RB]{0,2}:)?(?P<name>[A-Z0-9]+)(?:@(?P<seconds>[0-9]+))?", re.IGNORECASE)
SIGNAL_S = 60.0
"""SLURM's, where a script names a signal alone."""
DAYS = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<rest>[0-9]+(?::[0-9]+){0,2})")


def read_time(text: str, where: str) -> float | None:
    """Seconds of a time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None: unlimited, as 0 is.

    Raises:
        ConfigError: it is none; `where` says of whom.
    """
    if text.lower() in ("infinite", "unlimited", "-1"):
        return None
    found = DAYS.fullmatch(text)
    if found is None:
        raise ConfigError(f"{where}: --time={text} is no time limit: write it as 1-00:00:00 or 24:00:00")
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return float(int(found["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + seconds) or None


def read_signal(text: str, where: str) -> float:
    """Seconds before the time limit at which the launcher gets SIGUSR1 by sbatch's --signal=[R][B:]NAME[@SECONDS].

    Raises:
        ConfigError: it does not get that; `where` says of whom.
    """
    found = SIGNAL.fullmatch(text)
    if found is None or found["name"].upper() not in ("USR1", "SIGUSR1", "10"):
        raise ConfigError(f"{where}: --signal={text} is not what the launcher hears: write --signal=B:USR1@600")
    if "B" not in (found["to"] or "").upper():
        raise ConfigError(
            f"{where}: --signal={text} ends engines and trainer, and does not reach the launcher: write B:USR1@600"
        )
    return float(found["seconds"] or SIGNAL_S)


def check_signal(launch: LaunchConfig, limit_s: float | None, signal_s: float | None) -> None:
    """Raise ConfigError where nobody tells a job to save before its time limit, or too late, or as soon as it starts.

    Args:
        limit_s: as for check_time_limit.
        signal_s: seconds before it at which the launcher gets SIGUSR1; None: it gets none.
    """
    by_signal_alone, grace = launch.save_before_end_s == 0, launch.stop_grace_s
    if signal_s is None:
        if by_signal_alone and limit_s is not None:
            raise ConfigError(
                "launch.save_before_end_s=0, and the script has no #SBATCH --signal: nothing tells the run to save "
                "before the time limit: add --signal=B:USR1@600, or set launch.save_before_end_s"
            )
        return
    if limit_s is not None and signal_s >= limit_s:
        raise ConfigError(
            f"#SBATCH --signal comes {signal_s:.0f} s before the end of a job of {limit_s:.0f} s, which would go back "
            "into the queue at once: let it come later, or ask for more time"
        )
    if by_signal_alone and grace >= signal_s:
        raise ConfigError(
            f"launch.stop_grace_s={grace:g} must be less than the {signal_s:.0f} s of #SBATCH --signal, or "
            "launch.save_before_end_s more: the time limit would end the job while it saves"
        )


def check_time_limit(launch: LaunchConfig, limit_s: float | None) -> None:
    """Raise ConfigError where a job would go back into the queue at once, or could be ended while it saves.

    Args:
        limit_s: seconds that the job has from its start on; None: no limit.
    """
    before, grace = launch.save_before_end_s, launch.stop_grace_s
    if limit_s is None or before == 0:
        return
    if before >= limit_s:
        raise ConfigError(
            f"launch.save_before_end_s={before:g} leaves nothing of a job of {limit_s:.0f} s, which would go back into "
            "the queue at once: lower it, or ask for more time"
        )
    if grace >= before:
        raise ConfigError(
            f"launch.stop_grace_s={grace:g} must be less than launch.save_before_end_s={before:g}: the time limit "
            "would end the job while it saves"
        )
