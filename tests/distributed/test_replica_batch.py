"""A batch on its way: every rank gets its replica's micro-batches from a real server, under any layout."""

import asyncio
import multiprocessing
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from tests.distributed.harness import run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import BUILD
from tests.tiny import groups, packed_batch, run_config

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.batching.build import build_step_batch
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.errors import DapoError
from dapo_megatron.keys import make_keys
from dapo_megatron.messages import Done, FetchPart, FetchState, Part
from dapo_megatron.rollout.served import ServedBatch
from dapo_megatron.rpc import RpcClient, RpcServer
from dapo_megatron.trainer import replica_batch
from dapo_megatron.trainer.replica_batch import PartFetcher, fetched_batch
from launch.ports import reserved_ports

TP, PP, CP, DP = (
    f"{name}_size" for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "data_parallel")
)
LAYOUTS = {"one": {}, "TP2": {TP: 2}, "PP2": {PP: 2}, "CP2": {CP: 2}, "DP2": {DP: 2}, "DP2xTP2": {DP: 2, TP: 2}}
LAYOUTS |= {"DP2xPP2": {DP: 2, PP: 2}, "DP2xCP2": {DP: 2, CP: 2}}


def config_of(tmp_path, layout, deadline_s=60):
    actor = LAYOUTS[layout] | {"micro_batch_tokens": 40}
    return run_config(tmp_path, actor=actor, trainer={"collective_timeout_s": deadline_s})


@contextmanager
def controller(answer):
    """(address, keys) of a process that answers requests for parts, and counts them in `asked`."""
    with reserved_ports(1) as (port,):
        address, keys, asked = f"tcp://127.0.0.1:{port}", make_keys(), multiprocessing.Value("i", 0)

        async def serve():
            server = RpcServer(address, keys)
            while True:
                request = await server.receive()
                asked.value += 1
                await server.reply(answer(request))

        process = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(serve()), daemon=True)
        process.start()
        try:
            yield address, keys, asked
        finally:
            process.kill()
            process.join()


def bits(micro_batches):
    def of(value):
        return value.tobytes() if hasattr(value, "tobytes") else value

    return [[of(getattr(mb, name)) for name in mb.__struct_fields__] for mb in micro_batches]


def received(config, address, keys, parts):
    """(replica, the bits of both updates' micro-batches), the second update asked for first."""
    layout = init_parallel(config)
    deadline_s = config.deadlines.batch_part
    fetcher = PartFetcher(RpcClient(address, keys), deadline_s) if layout.is_first_of_replica else None
    try:
        batch = fetched_batch(fetcher, layout, packing_rules(config), 1, 0, parts)
        second, first = bits(batch[1]), bits(batch[0])
    except DapoError as e:
        return str(e)
    finally:
        if fetcher is not None:
            fetcher.close()
    return layout.dp_rank, [first, second]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part_tokens", [1, 10_000])
def test_every_rank_gets_what_its_replica_trains(tmp_path, layout, part_tokens):
    config = config_of(tmp_path, layout)
    rules = packing_rules(config)
    served = ServedBatch(build_step_batch(groups(), rules=rules, **BUILD), part_tokens=part_tokens)
    assert (max(map(max, served.counts)) > 1) == (part_tokens == 1)
    expected = packed_batch(groups(), rules=rules, **BUILD).mini_batches

    def answer(request):
        assert isinstance(request, FetchPart) and request.step == 1
        return Part(served.encoded(request.update, request.replica, request.part))

    with controller(answer) as (address, keys, asked):
        found = run_ranks(config.world_size, received, config, address, keys, served.counts)
    replicas = [replica for replica, _ in found]
    each = config.world_size // rules.data_parallel_size
    assert sorted(replicas) == sorted(list(range(rules.data_parallel_size)) * each)
    for replica, updates in found:
        assert updates == [bits(mini_batch.shards[replica]) for mini_batch in expected]
    assert asked.value == sum(map(sum, served.counts))  # nothing is sent twice


def test_what_one_replica_cannot_fetch_is_one_error_on_all(tmp_path):
    config = config_of(tmp_path, "DP2xTP2", 10)
    served = ServedBatch(build_step_batch(groups(), rules=packing_rules(config), **BUILD))

    def answer(request):
        if request.replica == 1 and request.update == 1:
            return Done()
        return Part(served.encoded(request.update, request.replica, request.part))

    with controller(answer) as (address, keys, _):
        found = run_ranks(4, received, config, address, keys, served.counts)
    assert len(set(found)) == 1
    assert "fetching update 2 of step 1 from the controller failed on trainer rank 2" in found[0]
    assert "answered FetchPart with Done" in found[0]


def test_a_controller_that_is_gone_is_named_before_the_others_give_up(tmp_path):
    config = config_of(tmp_path, "TP2", 4)
    with reserved_ports(1) as (port,):
        found = run_ranks(2, received, config, f"tcp://127.0.0.1:{port}", make_keys(), [[1], [1]])
    assert len(set(found)) == 1 and f"127.0.0.1:{port} did not answer FetchPart within 2 s" in found[0]


class Rpc:
    """Answers at once with what it was asked for; or never."""

    def __init__(self, answers=True):
        self.answers, self.waits = answers, threading.Event()

    def send(self, request, deadline_s):
        self.request = request

    def receive(self, is_interrupted):
        self.waits.set()
        end = time.monotonic() + 5
        while not self.answers and not is_interrupted() and time.monotonic() < end:
            time.sleep(0.01)
        return Part(repr(self.request).encode())

    def close(self):
        pass


def test_every_part_of_the_own_replica_is_asked_for_and_of_no_other(monkeypatch):
    monkeypatch.setattr(replica_batch, "all_agree", lambda *_: nullcontext())
    monkeypatch.setattr(replica_batch, "share_in_replica", lambda payload, layout: payload)
    monkeypatch.setattr(replica_batch, "decode_part", lambda payload: (None, [payload.decode()]))
    parts = [[1, 3], [2, 1]]
    for replica in (0, 1):
        fetcher = PartFetcher(Rpc(), deadline_s=9)
        batch = fetched_batch(fetcher, SimpleNamespace(dp_rank=replica), None, 5, 0, parts)
        asked = [[repr(FetchPart(5, u, replica, part)) for part in range(parts[u][replica])] for u in (0, 1)]
        assert [batch.shard(1), batch.shard(0)] == asked[::-1]
        states = [repr(FetchState(5, part)) for part in range(2)]
        assert fetcher.begin_state(5, 2).result().decode() == "".join(states)
        fetcher.close()


def test_what_is_not_fetched_yet_is_given_up_at_the_end():
    rpc = Rpc(answers=False)
    fetcher = PartFetcher(rpc, deadline_s=9)
    fetcher.begin(1, 0, [1, 1])
    rpc.waits.wait()
    began = time.monotonic()
    fetcher.close()
    assert time.monotonic() < began + 2
