"""megatron-core 0.19 imports, and does what a trainer does: update, save, resume. `make test-full` fetches it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NEWER = Path(".venv-megatron-0.19")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NEWER.exists(), reason=f"{NEWER} is not there: make test-full fetches it"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the probe is for CPU"),
]


@pytest.mark.parametrize("scenario", ["stages", "experts"])
def test_it_runs_on_two_ranks(scenario):
    environment = os.environ | {"PYTHONPATH": str(NEWER.resolve()), "PYTHONWARNINGS": "ignore"}
    check = "import megatron.core; print(megatron.core.__version__)"
    version = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("0.19")
    command = [sys.executable, "-m", "tests.distributed.compat_probe", scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
