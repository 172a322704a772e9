"""The GPU benchmark: its arithmetic and its loop run everywhere on a tiny model, the real one on a GPU."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from tests.distributed.harness import run_ranks  # first: patches megatron-core on machines without CUDA

from benchmarks.gpu_step import QWEN3_1_7B, Measurement, bench_config, measure, random_shard, table
from dapo_megatron.errors import DapoError

TINY = dataclasses.replace(QWEN3_1_7B, layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks cannot use a GPU")
def test_the_loop_runs_on_a_tiny_model():
    (row,) = run_ranks(1, measure, bench_config("off", 64, 32), TINY, 128, 32, 2)
    embedding, attention, mlp = 256 * 64, 64 * 128 + 64 * 64 + 2 * 16, 3 * 64 * 96
    assert row.parameters == embedding + 2 * (attention + mlp + 2 * 64) + 64
    assert (row.tokens, row.padding) == (128, 0)
    assert 0 < row.logprobs_s and 0 < row.update_s


def test_padding_is_not_a_token():
    shard = random_shard(bench_config("blockwise", 512, 100), TINY, 300, 100)
    assert sum(len(mb.tokens) for mb in shard) == 384
    assert sum(int(mb.cu_seqlens[len(mb.sequences)]) for mb in shard) == 300


def test_utilisation_is_six_parameters_tokens_over_peak():
    row = Measurement("off", parameters=2 * 10**9, tokens=10**4, padding=0, update_s=0.5, logprobs_s=0.1, peak_bytes=0)
    assert row.tflops() == pytest.approx(240)
    console = Console(width=200, record=True)
    console.print(table([row], "a GPU", 960.0))
    printed = console.export_text()
    assert "25.0 %" in printed and "20,000" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu_step"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: benchmarks.gpu_step needs a GPU")


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_of_1_7_billion_parameters_trains(capsys):
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--repeats", "2", "--peak-tflops", "989"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise DapoError(done.stderr[-2000:])
    with capsys.disabled():
        print(done.stdout)
    assert "bfloat16" in done.stdout
