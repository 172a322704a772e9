"""Every process of the comparison has a deadline, and its failure names its log."""

import sys
import time

import pytest
from benchmarks.vs_trl import run_within

from dapo_megatron.errors import DapoError


def test_a_process_past_its_deadline_is_stopped(tmp_path):
    began = time.monotonic()
    with pytest.raises(DapoError, match=r"slow took more than 1 s: see .*slow\.log"):
        run_within([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "slow.log", 1.0, threads=1)
    assert time.monotonic() - began < 20


def test_a_failure_names_code_and_log(tmp_path):
    with pytest.raises(DapoError, match=r"bad ended with exit code 3: see .*bad\.log"):
        run_within([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "bad.log", 30.0, threads=1)
