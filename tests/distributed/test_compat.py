"""Every patch of megatron-core is still needed: without it, a trainer does not get through update, save and resume."""

import subprocess
import sys

import pytest
import torch

from dapo_megatron.compat.megatron_cpu import PATCHES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for CPU")]


def probe(*arguments):
    command = [sys.executable, "-m", "tests.distributed.compat_probe", "pp2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_with_all_patches_it_runs():
    done = probe()
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("patch", [*PATCHES, "adam"])
def test_without_one_it_does_not(patch):
    done = probe(patch)
    assert done.returncode != 0
    expected = "step" if patch == "adam" else "CUDA"
    assert expected in done.stderr, done.stderr[-3000:]
