"""A push to a server that hangs or dies stops within its deadline, with a message that names server and bucket."""

import os
import signal

import psutil
import pytest
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend "fake")

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.engine.conftest import ENGINE, serve
from tests.tiny import hf_folder, run_config

from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.errors import DapoError
from dapo_megatron.resharding.push import Pusher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DEADLINE_S = 10


def signal_server(pid, number):
    server = psutil.Process(pid)
    for process in [*server.children(recursive=True), server]:
        os.kill(process.pid, number)


def faulty_push(config, url, pid, number):
    """The error of a second push, before whose first bucket the server gets a signal."""
    actor = actor_on_rank(config)
    pusher = Pusher(config, actor, lambda: of_urls([url]))
    pusher.connect()
    pusher.push(1)
    send = pusher._transport.send

    def strike(*args, **options):
        signal_server(pid, number)
        return send(*args, **options)

    pusher._transport.send = strike
    try:
        pusher.push(2)
    except DapoError as e:
        return str(e)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_server_and_the_bucket_are_named(tmp_path, tmp_path_factory, number):
    path = hf_folder(tmp_path / "model")
    config = run_config(path, engine=ENGINE, trainer={"collective_timeout_s": DEADLINE_S})
    with serve(path, tmp_path_factory.mktemp("logs")) as (url, pid):
        (message,) = run_ranks(1, faulty_push, config, url, pid, number, deadline_s=90)
    says = ["sending the weights of pipeline stage 0 failed", "bucket model.layers.0.self_attn.q_proj.weight", url]
    assert all(text in message for text in says), message


def push_that_delivers_nothing(config, url):
    """(error of a second push whose group says at once that all is sent, the version that the server then names)."""
    actor = actor_on_rank(config)
    pusher = Pusher(config, actor, lambda: of_urls([url]))
    pusher.connect()
    pusher.push(1)
    pusher._transport._group = dist.new_group(backend="fake")
    try:
        pusher.push(2)
    except DapoError as e:
        return str(e), EngineControl(url, 10).version()


def test_a_group_that_returns_at_once_and_delivers_nothing(tmp_path, tmp_path_factory):
    path = hf_folder(tmp_path / "model")
    config = run_config(path, engine=ENGINE, trainer={"collective_timeout_s": DEADLINE_S})
    with serve(path, tmp_path_factory.mktemp("logs")) as (url, _):
        ((message, version),) = run_ranks(1, push_that_delivers_nothing, config, url, deadline_s=90)
    says = ["bucket model.layers.0.self_attn.q_proj.weight", url, "within 5 s"]
    assert all(text in message for text in says), message
    assert version == "1"
