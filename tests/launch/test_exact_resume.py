"""N + M steps are N steps, kill -9 in the midst of a generation, and M steps: bit for bit, and little is done twice."""

import os
import signal
import time
from collections import Counter

import msgspec
import psutil
import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from dapo_megatron.checkpoint.store import published
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.rollout.ledger import read_ledger
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import finish, recipe, start
from tests.launch.exact import GENERATED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, SIZE, CONCURRENCY = 5, 4, 8
KILLS = [3] + ([5] if os.environ.get("LAYOUTS") == "all" else [])
"""Steps in whose generation everything is killed; checkpoints are of steps 2 and 4."""
UNLIKE = ("time", "speed/", "sync/seconds", "groups/from_bank")
"""Metrics of the clock, and of the resume itself."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return recipe(
        tmp_path_factory.mktemp("exact"),
        engine={"deterministic": True},
        rollout={
            "prompts_per_step": 6,
            "group_size": SIZE,
            "concurrency": CONCURRENCY,
            "function": "tests.launch.exact:rollout",
        },
        algorithm={"dynamic_sampling": True},
        grading={"grader": "tests.launch.exact:grade"},
        trainer={"steps": STEPS, "mini_batch_prompts": 2, "checkpoint_every": 2, "keep_checkpoints": 9},
        evaluation={"every": 2, "samples": 2},
    )


def begin(path, folder, *arguments):
    os.environ[GENERATED] = str(folder.path.with_suffix(".generated"))
    try:
        return start(path, f"run_dir={folder.path}", *arguments)
    finally:
        del os.environ[GENERATED]


def generated(folder):
    """Tokens of the responses to training prompts, one entry for each time that one was generated."""
    lines = folder.path.with_suffix(".generated").read_bytes().splitlines()
    found = [msgspec.json.decode(line, type=tuple[str, int, int]) for line in lines]
    return [((prompt, sample), tokens) for prompt, sample, tokens in found if "train" in prompt]


def groups_in_bank(folder, step):
    """Finished groups of a step, by the file's length prefixes."""
    data = folder.bank(step).read_bytes() if folder.bank(step).exists() else b""
    count = start = 0
    while start < len(data):
        start += 16 + int.from_bytes(data[start : start + 8], "little")
        count += start <= len(data)
    return max(0, count - 1)


def kill_in_the_generation_of(step, folder, process):
    """SIGKILL to every process of the job as soon as two groups of the step are finished."""
    newest = step - 1 - (step - 1) % 2
    while groups_in_bank(folder, step) < 2 or not folder.checkpoint(newest).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everything:
        if each.is_running():
            os.kill(each.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    psutil.wait_procs(everything, timeout=30)


def tensors(folder, step):
    """Everything in a distributed checkpoint: parameters, optimizer state, schedule."""
    model = folder.checkpoint(step) / "model"
    found = _load_state_dict_from_keys(checkpoint_id=str(model))
    return found | {"common": torch.load(model / "common.pt", weights_only=False)}


def assert_equal(a, b, where=""):
    """Bit for bit, through lists and dictionaries."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif hasattr(a, "getvalue"):
        assert a.getvalue() == b.getvalue(), where
    else:
        assert a == b, where


def test_a_killed_run_goes_on_as_if_nothing_had_happened(path, tmp_path):
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    code, output, _ = finish(begin(path, whole), 400)
    assert code == 0, output

    resume = []
    for step in KILLS:
        kill_in_the_generation_of(step, killed, begin(path, killed, *resume))
        resume = ["--resume"]
    code, output, _ = finish(begin(path, killed, *resume), 400)
    assert code == 0, output

    a, b = tensors(whole, STEPS), tensors(killed, STEPS)
    assert sum(isinstance(value, torch.Tensor) for value in a.values()) > 10
    assert_equal(a, b)
    records = [
        [{k: v for k, v in r.items() if not k.startswith(UNLIKE)} for r in read_metrics(folder)]
        for folder in (whole, killed)
    ]
    assert records[0] == records[1] and [r["step"] for r in records[0]] == list(range(STEPS + 1))
    assert read_ledger(whole.ledger) == read_ledger(killed.ledger)
    assert whole.samples.read_bytes() == killed.samples.read_bytes()
    assert (published(whole)[-1] / "controller.msgpack").read_bytes() == (
        published(killed)[-1] / "controller.msgpack"
    ).read_bytes()

    fates = Counter(e.fate for e in read_ledger(whole.ledger))
    assert fates["kept"] == 6 * STEPS and fates["carried"] and fates["all_wrong"], fates  # all of it was exercised

    once, often = dict(generated(whole)), generated(killed)
    assert len(once) == len(generated(whole)) and dict(often) == once
    # A group is in flight from its first request to its last; the client lets in as many as fit, in their order.
    lost = len(often) - len(once)
    assert lost <= len(KILLS) * (CONCURRENCY + SIZE)
    (taken,) = [r["groups/from_bank"] for r in read_metrics(killed) if r["step"] == KILLS[0]]
    assert taken >= 2
    print(f"lost {lost} responses of {len(once)}, {taken:.0f} groups taken back")
