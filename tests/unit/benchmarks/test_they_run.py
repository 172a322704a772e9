"""Benchmarks of the controller, at a size of seconds: whether targets are met is not asked here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("module", "groups", "shows"),
    [("control_plane", 16, "bytes a token on the wire"), ("rollout_bank", 8, "a resume opens the bank")],
)
def test_a_table_is_printed(module, groups, shows):
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", "--groups", str(groups)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert shows in done.stdout, done.stderr[-2000:]
