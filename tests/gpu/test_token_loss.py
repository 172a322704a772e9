"""The token-loss benchmark: one part of it runs everywhere on a small problem, the whole of it on a GPU."""

import json
import subprocess
import sys

import pytest
import torch

MODULE = "benchmarks.token_loss"
AT_SCALE = ["--tokens=16384", "--hidden=2048", "--dtype=bfloat16"]


def bench(*arguments, timeout_s=280):
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_part_of_it_on_a_small_problem():
    small = ["--tokens=64", "--hidden=32", "--vocab=4096", "--device=cpu", "--repeat=1"]
    measured = json.loads(bench(*small, "--part=this project"))
    assert 0 < measured["seconds"] < 10 and measured["bytes"] < 2**28
    assert all(seconds > 0 for seconds in json.loads(bench(*small, "--part=floors")).values())


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_twentieth_of_the_memory_of_full_logits(capsys):
    ours, full = (
        json.loads(bench(*AT_SCALE, f"--part={name}"))["bytes"] for name in ("this project", "full logits, log_softmax")
    )
    table = bench(*AT_SCALE, timeout_s=1800)
    with capsys.disabled():
        print(table)
    assert ours < full / 20
