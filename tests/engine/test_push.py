"""Resharding into a real server: from any trainer layout, the engine ends up with the trainer's log-probs."""

import pytest

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import LAYOUTS
from tests.engine.conftest import ENGINE
from tests.tiny import hf_folder, run_config

from dapo_megatron.errors import DapoError
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.resharding.verify import Verifier

PROMPTS = [[5, 9, 33, 2, 60, 17, 8], [3, 4], [61, 12, 12, 40, 7]]


def push_and_verify(config, url, version):
    actor = actor_on_rank(config)
    pusher = Pusher(config, actor, [url])
    pusher.connect()
    metrics = pusher.push(version)
    difference = Verifier(config, actor, pusher, PROMPTS).verify()
    pusher.close()
    return difference, metrics


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2", "dp2"])
def test_push_from_every_layout(tmp_path, engine_url, layout):
    # Other weights than the server holds, and buckets small enough that there are several.
    path = hf_folder(tmp_path, "qwen3", tied=True, seed=list(LAYOUTS).index(layout) + 2)
    config = run_config(path, actor=LAYOUTS[layout], engine=ENGINE, resharding={"bucket_mib": 1})
    version = 10 + list(LAYOUTS).index(layout)
    results = run_ranks(config.world_size, push_and_verify, config, engine_url, version)
    assert all(difference <= 1e-4 for difference, _ in results)
    assert all(m["sync/bytes"] > 100_000 for _, m in results)
    assert EngineControl(engine_url, 10).version() == str(version)


def verify_without_push(config, url):
    actor = actor_on_rank(config)
    pusher = Pusher(config, actor, [url])
    try:
        Verifier(config, actor, pusher, PROMPTS).verify()
    except DapoError as e:
        return str(e)


def test_other_weights_are_noticed(tmp_path, engine_url):
    config = run_config(hf_folder(tmp_path, "qwen3", tied=True, seed=999), engine=ENGINE)
    (message,) = run_ranks(1, verify_without_push, config, engine_url)
    assert "trainer and engine disagree" in message and engine_url in message


def push_to_nobody(config, url):
    pusher = Pusher(config, actor_on_rank(config), [url])
    try:
        pusher.connect()
    except DapoError as e:
        return str(e)


def test_absent_engine_is_named(tmp_path):
    config = run_config(hf_folder(tmp_path), engine=ENGINE | {"start_timeout_s": 1})
    (message,) = run_ranks(1, push_to_nobody, config, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 did not answer" in message
