"""What each node of a job holds in its own memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.checkpoint.size import SaveBytes
from dapo_megatron.config import load_config
from dapo_megatron.errors import ConfigError
from launch.host_memory import GIB, check_host_memory, host_memory
from launch.port_map import job_ports
from launch.topology import Node, place

DEMO = Path(__file__).parents[3] / "launch" / "recipes" / "demo.yaml"
LAYOUT = ["actor.tensor_model_parallel_size=1", "actor.pipeline_model_parallel_size=2", "actor.data_parallel_size=2"]
SAVE = SaveBytes(disk=0, copy=10 * GIB, gather=1000 * GIB)
GRADERS = GIB
RESPONSES = 32 * 16 * 12 * 9


def memory(*nodes):
    """Of the demo over two pipeline stages of two ranks and two engines; a rank of the second stage holds 100 times."""
    config = load_config(DEMO, [*LAYOUT, "engine.replicas=2"])
    return host_memory(config, place(config, nodes, nodes, job_ports(20000, 0)), SAVE, [GIB, 100 * GIB], 7 * GIB)


def test_by_hand():
    first, second = Node("a", "a", 0, 4), Node("b", "b", 0, 4, 64)
    a, b = memory(first, second)
    assert a.nodes == (first,) and b.nodes == (second,)
    assert (a.each.trainer, a.each.engines, a.each.copy, a.each.gather) == (2 * GIB, 7 * GIB, 20 * GIB, 2000 * GIB)
    assert (a.each.responses, a.each.graders) == (RESPONSES, GRADERS)
    assert a.each.total == 2029 * GIB + RESPONSES + GRADERS
    assert b.each == replace(a.each, trainer=200 * GIB, responses=0, graders=0)


@pytest.mark.parametrize(("gib", "is_enough"), [(2226.0, False), (2227.0, True), (None, True)])
def test_a_node_must_have_what_it_holds(gib, is_enough):
    _, b = memory(Node("a", "a", 0, 4), Node("b", "b", 0, 4, gib))
    if is_enough:
        check_host_memory(b)
        return
    with pytest.raises(ConfigError) as e:
        check_host_memory(b)
    assert str(e.value).startswith("b: a node needs 2227.0 GiB of host memory (trainer 200.0, engines 7.0, copy 20.0, ")
    assert "the job has 2226 there" in str(e.value) and "\n" not in str(e.value)
