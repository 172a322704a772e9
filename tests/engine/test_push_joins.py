"""Engines come and go: a push goes to those that are up, one that loads joins later, none serves an old version."""

import pytest

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.engine.conftest import ENGINE, serve
from tests.tiny import hf_folder, run_config

from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.errors import DapoError
from dapo_megatron.resharding.push import Pusher
from launch.ports import reserved_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def come_and_go(config, first, second, nowhere):
    """[what was seen after each change of the engine set]; `nowhere` is the URL of one that loads for ever."""
    actor, now = actor_on_rank(config), []

    def members(*named):
        now[:] = [EngineSet((now[0].generation if now else 0) + 1, tuple(Member(*member) for member in named))]

    def versions():
        return tuple(EngineControl(url, 10).version() for url in (first, second))

    members(("engine-0", first), ("engine-1", nowhere))
    pusher = Pusher(config, actor, lambda: now[0])
    seen = []
    try:
        pusher.connect()
    except DapoError as e:  # at first all are waited for
        seen.append(str(e))

    members(("engine-0", first))
    pusher.connect()
    pusher.push(1)
    seen.append((pusher.can_follow(), versions()))

    members(("engine-0", first), ("engine-1", nowhere))  # it loads, and is not waited for
    pusher.push(2)
    seen.append((pusher.can_follow(), versions()))

    members(("engine-0", first), ("engine-1", second, 2))  # another start of it is up
    seen.append(pusher.can_follow())
    pusher.connect()
    pusher.push(3)
    seen.append((pusher.can_follow(), versions()))

    members(("engine-0", nowhere, 2), ("engine-1", second, 2))  # the first one is gone, and loads
    pusher.push(4)
    seen.append((pusher.can_follow(), versions()))

    members(("engine-0", nowhere, 2), ("engine-1", nowhere, 2))  # it serves a version, and does not answer
    pusher._followed.connect(EngineSet(now[0].generation, now[0].members[1:]))
    try:
        pusher.connect()
    except DapoError as e:
        seen.append(str(e))
    return seen


def test_who_is_up_gets_every_version(tmp_path, tmp_path_factory):
    path = hf_folder(tmp_path / "model")
    config = run_config(path, engine=ENGINE | {"start_timeout_s": 6}, trainer={"collective_timeout_s": 30})
    with (
        serve(path, tmp_path_factory.mktemp("logs")) as (first, _),
        serve(path, tmp_path_factory.mktemp("logs")) as (second, _),
        reserved_ports(1) as (port,),
    ):
        nowhere = f"http://127.0.0.1:{port}"
        (seen,) = run_ranks(1, come_and_go, config, first, second, nowhere, deadline_s=200)
    late = f"engine-1 ({nowhere}) did not answer within 6 s"
    assert late in seen[0] and late in seen[-1]
    assert seen[1:-1] == [
        (False, ("1", "default")),
        (False, ("2", "default")),
        True,
        (False, ("3", "3")),
        (False, ("3", "4")),
    ]
