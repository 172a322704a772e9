"""The two command lines: there and back, interrupted, refused."""

import gc
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tools import convert_dist_to_hf, convert_hf_to_dist

from dapo_megatron.checkpoint.conversion import hf_to_dist, output
from dapo_megatron.checkpoint.integrity import intact_manifest
from tests.tiny import byte_tokenizer, hf_folder


def call(monkeypatch, capsys, tool, *arguments):
    """(exit code, stdout, stderr) of a tool in this process."""
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    code = tool.main()
    gc.unfreeze()  # or libraries find leaks at pytest's end
    said = capsys.readouterr()
    return code, said.out, said.err


def test_there_and_back(tmp_path, monkeypatch, capsys):
    path = hf_folder(tmp_path / "hf", "qwen2", True, vocab=67)
    byte_tokenizer().save_pretrained(path)
    capsys.readouterr()
    code, out, err = call(monkeypatch, capsys, convert_hf_to_dist, path, tmp_path / "a" / "dist")
    assert (code, out) == (0, f"{tmp_path / 'a' / 'dist'}: 0.00 GB of weights\n")
    assert "converting: 100%" in err
    code, out, _ = call(monkeypatch, capsys, convert_dist_to_hf, tmp_path / "a" / "dist", tmp_path / "back")
    assert (code, out) == (0, f"{tmp_path / 'back'}: 0.00 GB of weights\n")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    half = ("--dtype", "bfloat16")
    assert call(monkeypatch, capsys, convert_dist_to_hf, tmp_path / "a" / "dist", tmp_path / "half", *half)[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_refusals_are_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for tool in (convert_hf_to_dist, convert_dist_to_hf):
        code, said, err = call(monkeypatch, capsys, tool, tmp_path, out)
        assert (code, said, err.count("\n")) == (1, "", 1) and err.startswith(f"error: {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_one_line_and_the_next_call_goes_on(tmp_path, monkeypatch, capsys):
    path = hf_folder(tmp_path / "hf", layers=3)
    monkeypatch.setattr(hf_to_dist, "PART_BYTES", 40_000)
    read, count = hf_to_dist._Chunk.read, [0]

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(hf_to_dist._Chunk, "read", interrupted)
    capsys.readouterr()
    code, _, err = call(monkeypatch, capsys, convert_hf_to_dist, path, tmp_path / "dist")
    assert code == 130 and err.splitlines()[-1] == "interrupted: call it again to go on"
    assert (tmp_path / "dist.partial" / output.JOURNAL).exists()
    assert call(monkeypatch, capsys, convert_hf_to_dist, path, tmp_path / "dist")[0] == 0
    assert count[0] < 2 * 20 + 5  # of about 35


SLOWED = """
import itertools, sys, time
from dapo_megatron.checkpoint.conversion import hf_to_dist
from tools import convert_hf_to_dist
number, waits = itertools.count(), float(sys.argv.pop())
read, hf_to_dist.PART_BYTES = hf_to_dist._Chunk.read, 2**22
hf_to_dist._Chunk.read = lambda *arguments: (time.sleep(waits * (next(number) == 15)), read(*arguments))[1]
sys.exit(convert_hf_to_dist.main())
"""


@pytest.mark.slow
def test_a_real_process_stopped_by_ctrl_c_goes_on(tmp_path):
    """A model of 30 MB, interrupted in its 16th tensor, when the first parts are written down."""
    options = {"hidden_size": 256, "intermediate_size": 512, "vocab": 8_000}
    path = hf_folder(tmp_path / "hf", "llama", False, layers=6, **options)
    command = [sys.executable, "-W", "ignore", "-c", SLOWED, str(path), str(tmp_path / "dist")]
    process = subprocess.Popen(
        [*command, "6"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    journal, end = tmp_path / "dist.partial" / output.JOURNAL, time.monotonic() + 60
    while not journal.exists() or b"distcp" not in journal.read_bytes():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted: call it again to go on"
    done = subprocess.run([*command, "0"], check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    intact_manifest(tmp_path / "dist")
