"""Whether a SLURM job's time limit leaves room for work, and for saving before it. Pure."""

import re

from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.errors import ConfigError

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
