"""What is on the engine's path on CPU is right and still needed: without the stand-ins SGLang cannot be imported, and
without the plugin its attention over many sequences is several times as slow."""

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
    environment = engine_environment(os.environ, cpu=True)
    command = [sys.executable, "tests/engine/attention_probe.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["replaced"] and found["difference"] < 5e-6, (kind, found)
        assert found["plugin_s"] < found["own_s"] / 2, (kind, found)
