"""Saving while training goes on: what is written, by whom, when it is published, and that all of it comes back."""

import os
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_checkpoint import controller_at, updates
from tests.tiny import hf_folder, run_config

from dapo_megatron.actor.actor import Actor
from dapo_megatron.checkpoint import distributed, store
from dapo_megatron.checkpoint.audit import bit_sum, optimizer_sums
from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.inspect import differences, stored_tensors
from dapo_megatron.checkpoint.load import load_checkpoint, load_weights
from dapo_megatron.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.errors import DapoError
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.exporter import export_stage
from dapo_megatron.weights.hf_config import read_model

ALL = os.environ.get("LAYOUTS") == "all"
TP2_DP2 = {"tensor_model_parallel_size": 2, "data_parallel_size": 2}
EP2 = {"data_parallel_size": 2, "expert_model_parallel_size": 2}


def config_of(tmp_path, kind="qwen3", actor=None, options=None, **sections):
    path = hf_folder(tmp_path / "hf", kind, **({"tied": False, "vocab": 67} | (options or {})))
    config = run_config(path, actor=actor or {}, optimizer={"warmup_steps": 4}, **sections)
    return config.model_copy(update={"run_dir": str(tmp_path / "run")})


def relaid(config, actor):
    """The same run in another layout."""
    return config.model_copy(update={"actor": run_config(Path(config.model.path), actor=actor).actor})


def save(config, steps, format):
    """Two updates before each step's checkpoint; all of them published."""
    actor = actor_on_rank(config)
    checkpointer = Checkpointer(config, actor)
    for step in steps:
        updates(config, actor, 2)
        checkpointer.save(TrainState(step, step, 0), controller_at(step), format=format)
    checkpointer.finish()


def save_again(config, step, format):
    """Load the newest checkpoint and save it as the one of `step`."""
    actor = actor_on_rank(config)
    state, _ = load_checkpoint(actor, store.latest(RunFolder(Path(config.run_dir))))
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(step, state.version), controller_at(step), format=format)
    checkpointer.finish()


PAIRS = [
    ("dp_reshardable", {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}, "qwen3"),
    ("fully_reshardable", TP2_DP2, {"pipeline_model_parallel_size": 2}, "qwen3"),
    ("fully_reshardable", EP2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, "qwen3_moe"),
    ("fully_reshardable", EP2, {"pipeline_model_parallel_size": 2}, "qwen3_moe"),
    ("fully_reshardable", {"tensor_model_parallel_size": 2}, EP2, "qwen3_moe"),
    ("dp_reshardable", EP2, EP2, "qwen3_moe"),
    ("dp_reshardable", {"data_parallel_size": 2}, {}, "qwen2"),
]
if ALL:
    PAIRS += [
        ("fully_reshardable", {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}, "qwen3"),
        ("fully_reshardable", {"context_parallel_size": 2}, TP2_DP2, "qwen2"),
        ("fully_reshardable", {}, {"data_parallel_size": 4}, "llama"),
        ("fully_reshardable", EP2 | {"data_parallel_size": 4}, EP2, "qwen3_moe"),
        ("fully_reshardable", {"data_parallel_size": 2}, {}, "qwen3_moe"),
    ]


@pytest.mark.parametrize(("format", "saved", "resumed", "kind"), PAIRS)
def test_everything_comes_back_bit_for_bit(tmp_path, format, saved, resumed, kind):
    """Saved, loaded elsewhere and saved again: every weight and every optimizer state is the same on the disk."""
    moe = {"moe_intermediate_size": 20, "num_experts": 6, "vocab": 64} if kind == "qwen3_moe" else {}
    options = {"num_attention_heads": 8, "num_key_value_heads": 2, **moe}
    config = config_of(tmp_path, kind, saved, options)
    run_ranks(config.world_size, save, config, [1], format)
    other = relaid(config, resumed)
    run_ranks(other.world_size, save_again, other, 2, format)
    folder = RunFolder(tmp_path / "run")
    moments = [t for t in stored_tensors(folder.checkpoint(1)) if t.name.endswith(".exp_avg") or ".exp_avg." in t.name]
    assert moments
    found = [
        line
        for line in differences(folder.checkpoint(1), folder.checkpoint(2))
        # What the layout decides: its random states, and the rows that pad the vocabulary.
        if not line.startswith("random.") and "[68, " not in line
    ]
    assert not found
    audits = [read_manifest(folder.checkpoint(step)).audit for step in (1, 2)]
    assert audits[0].optimizer == audits[1].optimizer and all(audits[0].optimizer.values())


def test_equal_states_are_equal_files_and_later_ones_are_not(tmp_path):
    config = config_of(tmp_path, actor=TP2_DP2, checkpoint={"keep_last": 9})
    run_ranks(4, save, config, [1, 2, 3], "dp_reshardable")
    folder = RunFolder(tmp_path / "run")
    shards = [
        {name: record.xxh3 for name, record in read_manifest(path).files.items() if name.endswith(".distcp")}
        for path in store.published(folder)
    ]
    assert [len(s) for s in shards] == [4, 4, 4]
    for earlier, later in pairwise(shards):
        assert all(earlier[name] != later[name] for name in earlier)
    sums = [read_manifest(p).audit.optimizer["param"] for p in store.published(folder)]
    assert len(set(sums)) == 3
    run_ranks(4, save_again, config, 4, "dp_reshardable")
    assert not list(differences(folder.checkpoint(3), folder.checkpoint(4)))


@pytest.mark.parametrize("format", ["dp_reshardable", "fully_reshardable"])
def test_every_rank_writes_about_its_share(tmp_path, format):
    config = config_of(tmp_path, actor=TP2_DP2, options={"hidden_size": 128, "layers": 4, "vocab": 256})
    run_ranks(4, save, config, [1], format)
    model = RunFolder(tmp_path / "run").checkpoint(1) / "model"
    sizes = [p.stat().st_size for p in sorted(model.glob("*.distcp"))]
    assert len(sizes) == 4 and max(sizes) < 1.1 * sum(sizes) / 4 and min(sizes) > 0.9 * sum(sizes) / 4


def train_while_saving(config, slow_s):
    """Of a save on a disk that lets rank 1 wait for `slow_s`: how long training waited, what came of it."""
    actor = actor_on_rank(config)
    updates(config, actor, 1)
    write = distributed.write_copy
    if actor.layout.rank == 1:
        distributed.write_copy = lambda *arguments: (time.sleep(slow_s), write(*arguments))[1]
    checkpointer = Checkpointer(config, actor)
    expected = {name: tensor.clone() for name, tensor in export_stage(actor.modules, actor.shape)}
    began = time.monotonic()
    checkpointer.save(TrainState(1, 1), controller_at(1), format="dp_reshardable")
    stall = time.monotonic() - began
    steps, published = 0, {}
    while not published:
        updates(config, actor, 1)
        steps += 1
        published = checkpointer.poll()
        assert time.monotonic() - began < 60
    other = Actor(config, read_model(config.model.path), actor.layout)
    load_checkpoint(other, store.latest(RunFolder(Path(config.run_dir))))
    got = dict(export_stage(other.modules, other.shape))
    same = all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    now = dict(export_stage(actor.modules, actor.shape))
    moved = not any(torch.equal(now[name], tensor) for name, tensor in expected.items())
    return stall, steps, same, moved, published


def test_a_disk_slower_than_the_collective_deadline_slows_the_save_and_nothing_else(tmp_path):
    config = config_of(tmp_path, actor={"data_parallel_size": 2}, trainer={"collective_timeout_s": 3})
    for stall, steps, same, moved, published in run_ranks(2, train_while_saving, config, 5.0):
        assert stall < 2.5 and steps > 3
        assert same and moved, "what is on the disk is the state at the call, not the one that training has reached"
        assert published["checkpoint/seconds"] > 5 and (published["checkpoint/bytes"] > 0 or stall)


def save_on_a_dead_disk(config):
    actor = actor_on_rank(config)
    fsync = os.fsync
    os.fsync = lambda handle: (time.sleep(12), fsync(handle))
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(1, 1), controller_at(1), format="dp_reshardable")
    began = time.monotonic()
    try:
        checkpointer.finish()
    except DapoError as e:
        return str(e), e.kind, time.monotonic() - began


def test_a_disk_that_never_answers_ends_the_run_with_one_line(tmp_path):
    config = config_of(tmp_path, actor={"data_parallel_size": 2}, checkpoint={"timeout_s": 4.0})
    for message, kind, seconds in run_ranks(2, save_on_a_dead_disk, config):
        assert "takes more than checkpoint.timeout_s=4 s" in message and kind == "storage" and seconds < 9
    assert not store.published(RunFolder(tmp_path / "run"))


def save_on_one_full_disk(config):
    actor = actor_on_rank(config)
    if actor.layout.rank == 1:

        def no_room(*_, **__):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

        torch.save = no_room
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(1, 1), controller_at(1), format="dp_reshardable")
    try:
        checkpointer.finish()
    except DapoError as e:
        return str(e), e.kind


def test_one_full_disk_of_many_is_the_same_line_on_all_ranks_at_once(tmp_path):
    config = config_of(tmp_path, actor={"data_parallel_size": 2}, checkpoint={"timeout_s": 100.0})
    (message, kind), other = run_ranks(2, save_on_one_full_disk, config, deadline_s=60)
    assert (message, kind) == other and kind == "storage"
    assert "failed on trainer rank 1" in message and "make room on the disk of the run" in message


def save_with_a_bug(config):
    actor = actor_on_rank(config)
    if actor.layout.rank == 0:
        distributed.store.seal = lambda *_: {}["no such key"]
    checkpointer = Checkpointer(config, actor)
    checkpointer.save(TrainState(1, 1), controller_at(1), format="dp_reshardable")
    end = time.monotonic() + 20
    try:
        while time.monotonic() < end:
            checkpointer.poll()
            time.sleep(0.1)
    except DapoError as e:
        return str(e), e.kind


def test_whatever_ends_one_thread_is_soon_told_on_all_ranks(tmp_path):
    config = config_of(tmp_path, actor={"data_parallel_size": 2})
    (message, kind), other = run_ranks(2, save_with_a_bug, config)
    assert (message, kind) == other and kind == "crash"
    assert "completing the checkpoint failed on trainer rank 0" in message and "KeyError: 'no such key'" in message


def refusal(config, path=None, spoil=None):
    actor = actor_on_rank(config)
    if spoil:
        spoil(actor)
    try:
        load_checkpoint(actor, path or store.latest(RunFolder(Path(config.run_dir))))
    except DapoError as e:
        return str(e)


def test_another_layout_asks_for_the_other_format(tmp_path):
    config = config_of(tmp_path, actor={"tensor_model_parallel_size": 2}, checkpoint={"keep_last": 9})
    run_ranks(2, save, config, [1], "fully_reshardable")
    run_ranks(2, save_again, config, 2, "dp_reshardable")
    (message,) = run_ranks(1, refusal, relaid(config, {}))
    assert "step_000002 is dp_reshardable, saved with tp=2, the run has tp=1" in message
    assert message.endswith("from a fully_reshardable checkpoint such as step_000001")


def forget_the_moments(actor):
    load = actor.optimizer.load_state_dict

    def without(state):
        load(state)
        for group in actor.optimizer.param_groups:
            for p in group["params"]:
                for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
                    if p in part.optimizer.state:
                        part.optimizer.state[p]["exp_avg_sq"].zero_()

    actor.optimizer.load_state_dict = without


def forget_the_schedule(actor):
    actor.schedule.load_state_dict = lambda state: None


@pytest.mark.parametrize(("dtype", "pattern"), [(torch.bfloat16, "h"), (torch.float32, "i"), (torch.float64, "q")])
def test_a_sum_is_that_of_the_patterns_of_all_elements_in_64_bits(dtype, pattern):
    tensor = torch.tensor([1.5, -2.0, 3e38, -0.0, float("nan")], dtype=dtype).repeat(100)
    (raw,) = tensor[None].view(torch.uint8).numpy()
    total = sum(struct.unpack(f"{len(tensor)}{pattern}", raw.tobytes()))
    assert bit_sum(tensor) == (total + 2**63) % 2**64 - 2**63


def forget_everything(actor):
    actor.optimizer.load_state_dict = lambda state: None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (forget_the_moments, "the optimizer's exp_avg_sq did not come back"),
        (forget_everything, "the optimizer's exp_avg did not come back"),
        (forget_the_schedule, "the schedule came back at update 0, the manifest says 2"),
    ],
)
def test_what_was_not_restored_is_an_error_that_names_it(tmp_path, spoil, says):
    config = config_of(tmp_path)
    run_ranks(1, save, config, [1], "fully_reshardable")
    (message,) = run_ranks(1, refusal, config, None, spoil)
    assert says in message and "--resume-weights-only" in message


def test_another_data_cursor_than_the_manifests_is_an_error(tmp_path):
    config = config_of(tmp_path)
    run_ranks(1, save, config, [1], "fully_reshardable")
    path = RunFolder(tmp_path / "run").checkpoint(1)
    manifest = read_manifest(path)
    cursor = msgspec.structs.replace(manifest.audit.cursor, position=5)
    audit = msgspec.structs.replace(manifest.audit, cursor=cursor)
    (path / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, audit=audit)))
    (message,) = run_ranks(1, refusal, config)
    assert "controller.json holds DataCursor(step=1, epoch=0, position=1" in message and "position=5" in message


def begin_with_weights(config, path):
    actor = actor_on_rank(config)
    with torch.no_grad():
        for p in actor.modules[0].parameters():
            p.zero_()
    load_weights(actor, path)
    sums = optimizer_sums(actor.optimizer, actor.layout)
    weights = {name: bit_sum(tensor) for name, tensor in export_stage(actor.modules, actor.shape)}
    return sums, weights, actor.schedule.num_steps, updates(config, actor, 1)[0]["optimizer/lr"]


def weights_now(config):
    actor = actor_on_rank(config)
    load_checkpoint(actor, store.latest(RunFolder(Path(config.run_dir))))
    return {name: bit_sum(tensor) for name, tensor in export_stage(actor.modules, actor.shape)}


def test_weights_alone_begin_a_new_run(tmp_path):
    config = config_of(tmp_path, actor={"tensor_model_parallel_size": 2})
    run_ranks(2, save, config, [1], "dp_reshardable")
    expected = run_ranks(2, weights_now, config)[0]
    ((sums, weights, done, lr),) = run_ranks(
        1, begin_with_weights, relaid(config, {}), RunFolder(tmp_path / "run").checkpoint(1)
    )
    assert weights == expected and (sums["exp_avg"], sums["step"], done) == (0, 0, 0)
    assert lr == pytest.approx(1e-3 / 8)  # the first of 8 warm-up updates
    assert sums["param"] == read_manifest(RunFolder(tmp_path / "run").checkpoint(1)).audit.optimizer["param"]


def test_a_model_with_other_numbers_is_refused_by_name(tmp_path):
    config = config_of(tmp_path)
    run_ranks(1, save, config, [1], "fully_reshardable")
    other = run_config(hf_folder(tmp_path / "other", "qwen3", False, layers=3, vocab=67))
    path = RunFolder(tmp_path / "run").checkpoint(1)
    (message,) = run_ranks(1, refusal, other, path)
    assert "holds a model with layers=2, the run's has 3" in message


def evaluated_while_it_is_written(config):
    """What is published when an evaluation comes, and the checkpoints' evaluations in the end."""
    actor, folder = actor_on_rank(config), RunFolder(Path(config.run_dir))
    checkpointer, may_seal, seal = Checkpointer(config, actor), threading.Event(), store.seal

    def seal_later(*arguments):
        may_seal.wait()
        seal(*arguments)

    store.seal = seal_later
    checkpointer.save(TrainState(3, 3, 0), controller_at(3), format="dp_reshardable")
    checkpointer.evaluated(3, {"eval/accuracy": 0.25, "eval/greedy_accuracy": float("nan")})
    checkpointer.evaluated(4, {"eval/accuracy": 0.5})  # of a step without a checkpoint
    there = store.published(folder)
    may_seal.set()
    checkpointer.save(TrainState(5, 5, 0), controller_at(5), format="dp_reshardable")
    checkpointer.finish()
    checkpointer.evaluated(5, {"eval/accuracy": 0.75})
    return there, [(m.step, m.metrics) for m in map(read_manifest, store.published(folder))]


def test_an_evaluation_that_comes_while_its_checkpoint_is_written_is_added_when_it_is_published(tmp_path):
    config = config_of(tmp_path, actor={"data_parallel_size": 2}, checkpoint={"keep_last": 5})
    expected = [(3, {"eval/accuracy": 0.25}), (5, {"eval/accuracy": 0.75})]
    assert run_ranks(2, evaluated_while_it_is_written, config)[0] == ([], expected)
    assert store.latest_intact(RunFolder(Path(config.run_dir))).name == "step_000005"
