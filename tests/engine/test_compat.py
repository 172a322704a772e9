"""Each stand-in on the engine's path is still needed: without it, SGLang's server cannot be imported here."""

import os
import subprocess
import sys

import pytest
import torch

from dapo_megatron.compat import SGLANG_CPU
from launch.engine import engine_environment

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
