"""Time limits as sbatch takes them, and those that leave a job no room."""

import pytest

from dapo_megatron.config import LaunchConfig
from dapo_megatron.errors import ConfigError
from launch.time_limit import check_signal, check_time_limit, read_signal, read_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("1:02:03", 3723),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("2-3:04", 2 * 86400 + 3 * 3600 + 240),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 245),
        ("UNLIMITED", None),
        ("infinite", None),
        ("0:00:00", None),
        ("0-0", None),
        ("-1", None),
        ("0", None),
    ],
)
def test_every_way_to_write_a_time_limit(text, seconds):
    assert read_time(text, "x.sh") == seconds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1:00", "1:2:3:4", "1-2:3:4:5", "1.5", "24h"])
def test_what_is_no_time_limit_is_refused(text):
    with pytest.raises(ConfigError, match="^x.sh: --time=.* is no time limit"):
        read_time(text, "x.sh")


def test_a_job_has_time_to_work_and_to_save():
    check_time_limit(LaunchConfig(save_before_end_s=600, stop_grace_s=599), 601)
    check_time_limit(LaunchConfig(save_before_end_s=600, stop_grace_s=900), None)
    check_time_limit(LaunchConfig(save_before_end_s=0, stop_grace_s=900), 601)
    with pytest.raises(ConfigError, match="save_before_end_s=600 leaves nothing of a job of 600 s"):
        check_time_limit(LaunchConfig(save_before_end_s=600), 600)
    with pytest.raises(ConfigError, match="stop_grace_s=600 must be less than launch.save_before_end_s=600"):
        check_time_limit(LaunchConfig(save_before_end_s=600, stop_grace_s=600), 86400)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("B:USR1@600", 600), ("b:SIGUSR1@90", 90), ("B:10@90", 90), ("B:USR1", 60), ("RB:USR1@0", 0)],
)
def test_every_way_to_ask_for_the_signal(text, seconds):
    assert read_signal(text, "x.sh") == seconds


@pytest.mark.parametrize("text", ["USR1@600", "R:USR1@600", "10"])
def test_a_signal_that_does_not_reach_the_launcher_is_refused(text):
    with pytest.raises(ConfigError, match=f"^x.sh: --signal={text} ends engines and trainer, and does not reach"):
        read_signal(text, "x.sh")


@pytest.mark.parametrize("text", ["", "B:", "B:TERM@600", "B:USR2", "B:USR1@", "B:USR1@10:00", "B:USR1@600s"])
def test_a_signal_that_the_launcher_does_not_hear_is_refused(text):
    with pytest.raises(ConfigError, match="^x.sh: --signal=.* is not what the launcher hears: write --signal=B:"):
        read_signal(text, "x.sh")


def test_somebody_tells_of_the_time_limit_soon_enough():
    deaf = LaunchConfig(save_before_end_s=0, stop_grace_s=60)
    hears = LaunchConfig(save_before_end_s=90, stop_grace_s=60)
    check_signal(deaf, None, None)
    check_signal(hears, 600, None)
    check_signal(hears, 600, 30)  # the clock has told it before
    check_signal(deaf, 600, 61)
    check_signal(deaf, 600, 599)
    with pytest.raises(ConfigError, match="^launch.save_before_end_s=0, and the script has no #SBATCH --signal"):
        check_signal(deaf, 600, None)
    for limit_s in (600, None):
        with pytest.raises(ConfigError, match="stop_grace_s=60 must be less than the 60 s of #SBATCH --signal"):
            check_signal(deaf, limit_s, 60)
    with pytest.raises(ConfigError, match="--signal comes 600 s before the end of a job of 600 s, which would go"):
        check_signal(hears, 600, 600)
