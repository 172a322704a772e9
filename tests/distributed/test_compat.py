"""Every patch of megatron-core is still needed: without it, a trainer does not get through update, save and resume."""

import subprocess
import sys

import pytest
import torch

from dapo_megatron.compat.megatron_cpu import PATCHES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for CPU")]


OF_EXPERTS = ("streams", "experts")


def probe(scenario, *without):
    command = [sys.executable, "-m", "tests.distributed.compat_probe", scenario, *without]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("scenario", ["stages", "experts"])
def test_with_all_patches_it_runs(scenario):
    done = probe(scenario)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("patch", [*PATCHES, "adam"])
def test_without_one_it_does_not(patch):
    done = probe("experts" if patch in OF_EXPERTS else "stages", patch)
    assert done.returncode != 0
    expected = {"adam": "step", "experts": "te_general_gemm"}.get(patch, "CUDA")
    assert expected in done.stderr, done.stderr[-3000:]
