"""N + M steps are N steps, kill -9 in the midst of a generation, and M steps: bit for bit, and little is done twice."""

import contextlib
import os
import time
from collections import Counter

import msgspec
import psutil
import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from dapo_megatron.checkpoint.store import controller_state, published
from dapo_megatron.config import load_config
from dapo_megatron.errors import ConfigError
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.rollout.ledger import check_exactly_once, read_ledger
from dapo_megatron.run_folder import RunFolder
from launch.replay import beginning, find_batches, replay_batches
from tests.launch.conftest import finish, recipe, start
from tests.launch.exact import GENERATED
from tools.check_ledger import check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, SIZE, CONCURRENCY = 5, 4, 8
KILLS = [3] + ([5] if os.environ.get("LAYOUTS") == "all" else [])
"""Steps in whose generation everything is killed; checkpoints are of steps 2 and 4."""
UNLIKE = ("time", "speed/", "sync/seconds", "groups/from_bank", "checkpoint/")
"""Metrics of the clock (when a checkpoint is published, too), and of the resume itself."""
ACTORS = [{}]
if os.environ.get("LAYOUTS") == "all":
    ACTORS += [{"tensor_model_parallel_size": 1, "data_parallel_size": 2}]


def job(folder, **sections):
    """A recipe whose groups are of every fate."""
    return recipe(
        folder,
        rollout={
            "prompts_per_step": 6,
            "group_size": SIZE,
            "concurrency": CONCURRENCY,
            "function": "tests.launch.exact:rollout",
        }
        | sections.pop("rollout", {}),
        algorithm={"dynamic_sampling": True},
        grading={"grader": "tests.launch.exact:grade"},
        trainer={"steps": STEPS, "mini_batch_prompts": 2},
        checkpoint={"every": 2, "keep_last": 9},
        evaluation={"every": 2, "samples": 2},
        **sections,
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
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
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


def assert_replayed(folder):
    """The dumped batches, trained without engines, give the run's metrics: from the start, and from a checkpoint."""
    config, records = load_config(folder.config), read_metrics(folder)
    for first in (1, 5):
        replayed = []
        begin = beginning(folder, first)
        assert (begin is None) == (first == 1)
        batches = [folder.batch(step) for step in range(first, STEPS + 1)]
        assert find_batches(folder.path)[1][first - 1 :] == batches
        replay_batches(config, batches, begin, replayed.append)
        assert [step["step"] for step in replayed] == list(range(first, STEPS + 1))
        for step in replayed:
            record = records[step["step"]]
            assert len(step["metrics"]) > 8 and step["metrics"] == {name: record[name] for name in step["metrics"]}
            assert step["tokens"] == record["batch/tokens"]
    with pytest.raises(ConfigError, match="no checkpoint of step 3, after which batch 4 was trained: say with --begin"):
        beginning(folder, 4)


@pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: ",".join(actor) or "tp")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, actor):
    path = job(tmp_path, engine={"deterministic": True}, actor=actor, observe={"dump_batches": True})
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
    assert controller_state(published(whole)[-1]) == controller_state(published(killed)[-1])

    assert_replayed(whole)

    fates = Counter(e.fate for e in read_ledger(whole.ledger))
    assert fates["kept"] == 6 * STEPS and fates["carried"] and fates["all_wrong"], fates  # all of it was exercised

    once, often = dict(generated(whole)), generated(killed)
    assert len(once) == len(generated(whole)) and dict(often) == once
    step_of = {e.prompt_id: e.step for e in reversed(read_ledger(whole.ledger))}  # where each was generated
    again = Counter(
        step_of[prompt] for (prompt, _), n in Counter(key for key, _ in often).items() for _ in range(n - 1)
    )
    assert min(again, default=STEPS) >= KILLS[0]
    # A group is in flight from its first request to its last; the client lets in as many as fit, in their order.
    assert all(again[step] <= CONCURRENCY + SIZE for step in KILLS), again
    (taken,) = [r["groups/from_bank"] for r in read_metrics(killed) if r["step"] == KILLS[0]]
    assert taken >= 2


@pytest.mark.skipif(os.environ.get("LAYOUTS") != "all", reason="three more starts of a job")
def test_ahead_of_the_trainer_the_ledger_proves_that_every_prompt_was_used_once(tmp_path, capsys):
    path = job(tmp_path, rollout={"max_policy_lag": 1}, engine={"replicas": 2})
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:12]))  # several epochs
    folder, steps = RunFolder(tmp_path / "run"), "trainer.steps=9"
    kill_in_the_generation_of(3, folder, begin(path, folder, steps))
    kill_in_the_generation_of(7, folder, begin(path, folder, steps, "--resume"))
    code, output, _ = finish(begin(path, folder, steps, "--resume"), 400)
    assert code == 0, output
    check(folder, None)
    assert "no prompt was skipped or used twice" in (out := capsys.readouterr().out) and " 0 whole epochs" not in out
    assert check_exactly_once(read_ledger(folder.ledger), 12).epochs >= 4
    records = {r["step"]: r for r in read_metrics(folder)}
    assert list(records) == list(range(10)) and records[3]["groups/from_bank"] >= 2
    assert max(r["rollout/lag_max"] for r in list(records.values())[1:]) <= 1
