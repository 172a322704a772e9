"""What is on the engine's path on CPU is right and still needed: without the stand-ins SGLang cannot be imported, and
without the plugins its attention over many sequences is several times as slow, seeds are not heard, and each of its
processes imports all of it again."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dapo_megatron.compat import SGLANG_CPU
from dapo_megatron.engines.command import engine_environment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for CPU")]

IMPORT = "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler"


def import_server(folder):
    environment = engine_environment(os.environ, cpu=True) | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=200)


def probed(what):
    """What a probe has printed, which ran in an engine's environment."""
    command, environment = [sys.executable, f"tests/engine/{what}_probe.py"], engine_environment(os.environ, cpu=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_with_the_stand_ins_it_is_imported():
    done = import_server(SGLANG_CPU)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["sgl_kernel", "torchvision"])
def test_without_one_it_is_not(tmp_path, name):
    text = (SGLANG_CPU / "sitecustomize.py").read_text()
    (tmp_path / "sitecustomize.py").write_text(text.replace(f'"{name}"', '"nothing"'))
    done = import_server(tmp_path)
    assert done.returncode != 0 and name in done.stderr


def test_the_plugin_attends_as_sglang_does_and_is_faster():
    for kind, found in probed("attention").items():
        assert found["replaced"] and found["difference"] < 5e-6, (kind, found)
        assert found["plugin_s"] < found["own_s"] / 2, (kind, found)


def test_the_plugin_forks_what_sglang_would_spawn():
    assert probed("fork") == {"before": {"method": "spawn"}, "after": {"method": "fork", "imported": True}}


def murmur3(seed, position, column):
    """MurmurHash3 (x86, 32 bits) of seed, position and column as 16 bytes, as its author has it."""
    h = 0
    for k in (seed & 0xFFFFFFFF, seed >> 32, position, column):
        k = k * 0xCC9E2D51 & 0xFFFFFFFF
        k = (k << 15 | k >> 17) & 0xFFFFFFFF
        h ^= k * 0x1B873593 & 0xFFFFFFFF
        h = ((h << 13 | h >> 19) & 0xFFFFFFFF) * 5 + 0xE6546B64 & 0xFFFFFFFF
    h ^= 16
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def test_without_the_plugin_seeds_are_not_heard():
    found = probed("sampling")
    before, after = found["before"], found["after"]
    assert before["seeds"] is None and isinstance(before["hashes"], str)
    first, second, third, fourth = zip(*before["sampled"], strict=True)
    assert len(set(first)) > 1
    assert after["seeds"] == [5, -1, 2**31 - 1, 5]
    rows = [(5, 0), (2**64 - 1, 1), (2**31 - 1, 77), (5, 0)]
    assert after["hashes"] == [[murmur3(seed, position, c) for c in (0, 1)] for seed, position in rows]
    first, second, third, fourth = zip(*after["sampled"], strict=True)
    assert len(set(first)) == len(set(third)) == 1 and first == fourth
    assert len(set(second)) > 1  # a request without a seed still draws from the engine's generator
