"""Resharding into a real server: from any trainer layout, the engine samples as the trainer would."""

import psutil
import pytest

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import LAYOUTS
from tests.engine.conftest import ENGINE
from tests.tiny import hf_folder, run_config

from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.errors import EngineError
from dapo_megatron.resharding import broadcast, push
from dapo_megatron.resharding.plan import plan_push
from dapo_megatron.resharding.verify import Verifier
from dapo_megatron.weights.hf_config import read_model
from launch.ports import reserved_ports

PROMPTS = [[5, 9, 33, 2, 60, 17, 8], [3, 4], [61, 12, 12, 40, 7]]


def push_and_verify(config, url, version):
    actor = actor_on_rank(config)
    pusher = push.Pusher(config, actor, lambda: of_urls([url]))
    verifier = Verifier(config, actor, pusher, PROMPTS)
    pusher.connect()
    verifier.prime()
    metrics = pusher.push(version)
    metrics |= verifier.verify(version)
    pusher.close()
    return metrics


@pytest.mark.parametrize(
    ("layout", "transport"),
    [*((layout, "broadcast") for layout in ("one", "tp2_sp", "pp2", "dp2")), ("tp2_sp", "disk"), ("pp2", "disk")],
)
def test_push_from_every_layout(tmp_path, engine_url, layout, transport):
    # Other weights than the server holds, and buckets small enough that there are several.
    version = 10 + list(LAYOUTS).index(layout) + (20 if transport == "disk" else 0)
    path = hf_folder(tmp_path / "model", "qwen3", tied=True, seed=version)
    config = run_config(
        path,
        actor=LAYOUTS[layout],
        engine=ENGINE,
        resharding={"bucket_mib": 1, "transport": transport},
        rollout={"temperature": 0.7},
    ).model_copy(update={"run_dir": str(tmp_path / "run")})
    results = run_ranks(config.world_size, push_and_verify, config, engine_url, version)
    assert all(0 < m["sync/logprob_difference"] <= 1e-4 for m in results)
    plan = plan_push(
        read_model(path),
        config.actor,
        config.engine,
        dtype="float32",
        engine_dtype="float32",
        bucket_bytes=1 << 20,
    )
    assert all(m["sync/bytes"] == plan.bytes > 100_000 for m in results)
    # Of each of two layers: queries, keys and values; output; gate and up; down; four norms. Embedding, norm.
    assert all(m["sync/checksums"] == 2 * 8 + 2 for m in results)
    assert EngineControl(engine_url, 10).version() == str(version)


def push_over_two_groups(config, url, ports):
    """Ports that this rank listens on after a push over a first group, and one over a second in its place."""
    pusher = push.Pusher(config, actor_on_rank(config), lambda: of_urls([url]), ports=ports)
    for version in (60, 61):
        pusher.connect()
        pusher.push(version)
    listening = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    pusher.close()
    return [ports.index(port) for port in ports if port in listening]


def test_groups_meet_on_the_given_ports_one_after_the_other(tmp_path, engine_url):
    config = run_config(hf_folder(tmp_path, "qwen3", tied=True), actor=LAYOUTS["pp2"], engine=ENGINE)
    with reserved_ports(8) as ports:
        assert run_ranks(2, push_over_two_groups, config, engine_url, ports) == [[2], [3]]
    assert EngineControl(engine_url, 10).version() == "61"


def message_of(config, url, version):
    try:
        push_and_verify(config, url, version)
    except EngineError as e:
        return str(e)


def without_a_flush(config, url, version):
    receive = broadcast._receive
    broadcast._receive = lambda engine, group, bucket, flush_cache: receive(engine, group, bucket, False)
    EngineControl.flush_cache = lambda self: None
    return message_of(config, url, version)


def test_keys_and_values_of_an_earlier_policy_are_noticed(tmp_path, engine_url):
    config = run_config(hf_folder(tmp_path, "qwen3", tied=True, seed=77), engine=ENGINE)
    (message,) = run_ranks(1, without_a_flush, config, engine_url, 77)
    assert (
        f"trainer and engine {engine_url} disagree" in message
        and "every parameter but experts is there bit for bit" in message
    )


def verify_without_push(config, url):
    actor = actor_on_rank(config)
    pusher = push.Pusher(config, actor, lambda: of_urls([url]))
    pusher.connect()
    for engine in pusher.engines:
        engine.set_version(5)
    errors = []
    for version in (5, 6):
        try:
            Verifier(config, actor, pusher, PROMPTS).verify(version)
        except EngineError as e:
            errors.append(str(e))
    return errors


def test_other_weights_and_other_versions_are_noticed(tmp_path, engine_url):
    path = hf_folder(tmp_path, "qwen3", tied=True, seed=999)
    for checksums in (True, False):
        config = run_config(path, engine=ENGINE, resharding={"verify_checksums": checksums})
        ((weights, version),) = run_ranks(1, verify_without_push, config, engine_url)
        assert (f"engine {engine_url} holds other weights than the trainer in 18 of 18" in weights) == checksums
        assert (f"trainer and engine {engine_url} disagree" in weights) == (not checksums)
        assert "sampled with version 5 after version 6 was pushed" in version


def changed_by_somebody_else(config, url):
    actor = actor_on_rank(config)
    pusher = push.Pusher(config, actor, lambda: of_urls([url]))
    pusher.connect()
    pusher.push(1)
    EngineControl(url, 10).set_version(40)
    try:
        pusher.push(2)
    except EngineError as e:
        return str(e)


def test_a_version_that_the_trainer_did_not_set_ends_the_push(tmp_path, engine_url):
    config = run_config(hf_folder(tmp_path, "qwen3"), engine=ENGINE)
    (message,) = run_ranks(1, changed_by_somebody_else, config, engine_url)
    assert "serves version 40, the trainer had pushed 1" in message


def order_of_calls(config, url):
    calls = []
    plan = push.plan_buckets
    push.plan_buckets = lambda tensors, dtype, _: plan(tensors, dtype, 40_000)
    for name in ("pause", "begin_update", "receive_tensors", "end_update", "set_version", "resume"):
        original = getattr(EngineControl, name)

        def spied(self, *args, _name=name, _original=original, **options):
            calls.append((_name, options.get("flush_cache")))
            return _original(self, *args, **options)

        setattr(EngineControl, name, spied)
    push_and_verify(config, url, 3)
    return calls


def test_the_version_comes_after_the_weights_and_the_flush_with_the_last_of_them(tmp_path, engine_url):
    config = run_config(hf_folder(tmp_path), engine=ENGINE)
    (calls,) = run_ranks(1, order_of_calls, config, engine_url)
    sent = [flush for name, flush in calls if name == "receive_tensors"]
    assert len(sent) > 2 and sent == [False] * (len(sent) - 1) + [True]
    assert [name for name, _ in calls if name != "receive_tensors"] == [
        "end_update",  # what an earlier push may have left open
        "resume",
        "pause",
        "begin_update",
        "end_update",
        "set_version",
        "resume",
    ]
    assert [name for name, _ in calls][-4:] == ["receive_tensors", "end_update", "set_version", "resume"]


def push_to_nobody(config, url):
    pusher = push.Pusher(config, actor_on_rank(config), lambda: of_urls([url]))
    try:
        pusher.connect()
    except EngineError as e:
        return str(e)


def test_absent_engine_is_named(tmp_path):
    config = run_config(hf_folder(tmp_path), engine=ENGINE | {"start_timeout_s": 1})
    (message,) = run_ranks(1, push_to_nobody, config, "http://127.0.0.1:9")
    assert "engine-0 (http://127.0.0.1:9) did not answer within 1 s" in message
