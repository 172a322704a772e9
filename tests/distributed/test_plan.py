"""The plan of a push against the push itself, on gloo ranks: tensors, bytes, shards, memory."""

import json
import time
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.tiny import UNLIKE, hf_folder, run_config

from dapo_megatron.actor.layout_check import check_layout
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.resharding import plan, push
from dapo_megatron.weights.hf_config import read_model

BUCKET_MIB = 1
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CASES = {
    "one": ("qwen2", True, {}),
    "tp2, tied": ("qwen3", True, TP2),
    "tp2": ("llama", False, TP2),
    "tp2, norms over all heads": ("olmo2", False, TP2),
    "pp2, tied": ("qwen2", True, PP2),
    "pp2 x vpp2": ("qwen3", False, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "tp2 x pp2": ("qwen2", False, TP2 | PP2),
    "dp2": ("llama", True, {"data_parallel_size": 2}),
    "experts, tp2": ("qwen3_moe", False, TP2),
    "experts, ep2": ("qwen3_moe", False, {"expert_model_parallel_size": 2, "data_parallel_size": 2}),
    "experts, ep2 x tp2": ("qwen3_moe", False, TP2 | {"expert_model_parallel_size": 2}),
}


def settled(*tensors, start):
    """Return when gloo's thread has let go of the tensors, too: it does so whenever it is its turn."""
    before = [t._use_count() for t in tensors]
    start()
    end = time.monotonic() + 20
    while any(t._use_count() > count for t, count in zip(tensors, before, strict=True)):
        assert time.monotonic() < end, "tensors are held for ever"
        time.sleep(0.001)


class Over:
    """Of a collective that has ended."""

    def is_completed(self):
        return True

    def wait(self):
        return True


def push_of_a_stage(config, trace):
    """(stage or None, buckets, bytes given to the sender, peak of memory) of this rank, when its stage is sent."""
    actor = actor_on_rank(config)
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]  # nobody listens to the senders
    pusher = push.Pusher(config, actor, lambda: of_urls([]))
    pusher._transport._group, fill, transfer = groups[dist.get_rank()], push.fill, dist.batch_isend_irecv
    buckets, given = [], []

    def filled(bucket, tensors, device):
        buckets.append((bucket, []))
        return fill(bucket, map(noted, tensors), device)

    def noted(pair):
        buckets[-1][1].append((pair[0], tuple(pair[1].shape)))
        return pair

    def gave(operations):
        given.extend(o.tensor.nbytes for o in operations if o.op is dist.isend)
        settled(*(o.tensor for o in operations), start=lambda: [r.wait() for r in transfer(operations)])
        return []

    def broadcast(tensor, **options):
        settled(tensor, start=lambda: whole_broadcast(tensor, **options | {"async_op": False}))
        return Over()

    whole_broadcast = dist.broadcast
    push.fill, dist.batch_isend_irecv, dist.broadcast = filled, gave, broadcast
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pusher._send_stage(1)
    path = trace / f"{dist.get_rank()}.json"
    profile.export_chrome_trace(str(path))
    return actor.layout.pp_rank if pusher.is_sender else None, buckets, sum(given), peak_of(path)


def peak_of(path):
    """Largest number of bytes that were allocated in a trace and not yet freed."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    return max(accumulate((e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])), initial=0))


@pytest.mark.parametrize(
    ("case", "engine_dtype"), [*((case, "bfloat16") for case in CASES), ("one", "float32"), ("tp2", "float32")]
)
def test_what_is_sent_is_what_was_planned(tmp_path, monkeypatch, case, engine_dtype):
    for module in (plan, push):  # so that there are several gathers
        monkeypatch.setattr(module, "GATHER_BYTES", 1 << 20)
    kind, tied, actor = CASES[case]
    path = hf_folder(tmp_path / "model", kind, tied, layers=4, vocab=4099, **UNLIKE)
    config = run_config(path, actor=actor, engine={"dtype": engine_dtype}, resharding={"bucket_mib": BUCKET_MIB})
    shape = read_model(path)
    check_layout(config, shape)
    types = {"dtype": "float32", "engine_dtype": engine_dtype}
    expected = plan.plan_push(shape, config.actor, config.engine, **types, bucket_bytes=BUCKET_MIB << 20)

    results = run_ranks(config.world_size, push_of_a_stage, config, tmp_path)
    senders = {stage: (buckets, peak) for stage, buckets, _, peak in results if stage is not None}
    assert senders.keys() == set(range(len(expected.stages)))
    for stage, (buckets, peak) in senders.items():
        planned = expected.stages[stage]
        assert [bucket for bucket, _ in buckets] == list(planned.buckets)
        assert [t for _, tensors in buckets for t in tensors] == [t for g in planned.gathers for t in g.tensors]
        assert peak == pytest.approx(planned.sender_peak, rel=0.01)
    # Who has no part in the stage's first replica gives nothing; a group of one gathers nothing.
    assert sum(given for _, _, given, _ in results) == expected.gathered
