"""`dapo-megatron check`: passes what is right, fails what is not, and says when it cannot know."""

import json
import subprocess
import sys

import pytest

from tests.distributed.test_actor import ROPES
from tests.tiny import UNLIKE, hf_folder

# A wrong epsilon stands for any difference between trainer and transformers.
FAILING = """
import dataclasses, sys
from types import SimpleNamespace
from dapo_megatron.trainer import check_model as check
read, memory = check.read_model, check.psutil.virtual_memory
check.read_model = lambda folder: dataclasses.replace(read(folder), norm_eps=1e-3)
codes = [check.main()]
check.read_model, check.psutil.virtual_memory = read, lambda: SimpleNamespace(available=1000)
codes.append(check.main())
check.psutil.virtual_memory = memory
codes.append(check.main())
print(codes)
"""


def run(*command):
    return subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("case", ["llama3 tied", "qwen3_moe, attn_factor"])
def test_a_right_model_passes(tmp_path, case):
    if case == "llama3 tied":
        path = hf_folder(tmp_path, "llama", True, **UNLIKE, rope_parameters=ROPES["llama3"])
    else:
        path = hf_folder(tmp_path, "qwen3_moe", False, rope_parameters=ROPES["yarn"])
        config = json.loads((path / "config.json").read_text())
        config["rope_parameters"]["attn_factor"] = 0.8
        (path / "config.json").write_text(json.dumps(config))
    done = run("-m", "dapo_megatron.cli", "check", str(path))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("pass:") and "over 134 positions and 64 tokens" in line
    assert float(line.split("transformers ")[1].split()[0]) < 1e-5


def test_a_difference_fails_and_a_large_model_is_not_begun(tmp_path):
    done = run("-c", FAILING, str(hf_folder(tmp_path, "qwen2")))
    assert done.stdout.splitlines()[-1] == "[1, 1, 0]", done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert "fail:" in errors[0] and "1e-03 is allowed" in errors[0]
    assert "the check needs 0.0 GiB of memory (float32), 0.0 are free" in errors[1]


def test_a_config_that_transformers_refuses_is_one_line(tmp_path):
    path = hf_folder(tmp_path)
    config = json.loads((path / "config.json").read_text())
    for odd, name in [({"use_cache": 3}, "use_cache"), ({"dtype": "x"}, "torch")]:  # the trainer has no use for these
        (path / "config.json").write_text(json.dumps(config | odd))
        done = run("-m", "dapo_megatron.cli", "check", str(path))
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith(f"error: {path}/config.json is refused by transformers: ")
        assert name in line


def test_an_unsupported_model_is_one_line(tmp_path):
    done = run("-m", "dapo_megatron.cli", "check", str(tmp_path))
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == f"error: {tmp_path} has no config.json: give a Hugging Face checkpoint folder"
    )
