"""Where processes run: exhaustively over small clusters, and by hand for the real ones."""

from collections import Counter
from itertools import product

import pytest

from dapo_megatron.errors import ConfigError
from launch.port_map import WEIGHT_GROUPS, PortMap, job_ports, ports_needed
from launch.topology import Node, place, place_engines, place_ranks, sides, split
from tests.tiny import run_config


def nodes(count, gpus, cpus=32):
    return [Node(f"n{i}", f"10.0.0.{i + 1}", gpus, cpus) for i in range(count)]


def config(replicas=1, engine_tp=1, tp=1, pp=1, dp=1):
    return run_config(
        "model",
        engine={"replicas": replicas, "tensor_parallel_size": engine_tp},
        actor={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "data_parallel_size": dp},
    )


CONFIGS = [
    config(replicas, engine_tp, tp, *((2, world // tp // 2) if world // tp % 2 == 0 else (1, world // tp)))
    for replicas, engine_tp, world, tp in product(range(1, 5), range(1, 5), range(1, 9), range(1, 5))
    if world % tp == 0
]
PORTS = job_ports(20000, 4711)


def check(found, c, trainer, engines):
    """Nothing is given twice, everything that was asked for is there, and groups lie inside nodes."""
    places = [*found.engines, *found.ranks, found.controller]
    assert [e.replica for e in found.engines] == list(range(c.engine.replicas))
    assert [r.rank for r in found.ranks] == list(range(c.world_size))
    assert all(e.node in engines for e in found.engines) and all(r.node in trainer for r in found.ranks)
    assert found.controller.node == found.ranks[0].node

    with_gpus = any(node.gpus for node in [*trainer, *engines])
    given = [(p.node.name, device) for p in places for device in p.devices]
    assert len(given) == len(set(given)) and all(d < p.node.gpus for p in places for d in p.devices)
    assert all(len(e.devices) == with_gpus * c.engine.tensor_parallel_size for e in found.engines)
    assert all(len(r.devices) == with_gpus for r in found.ranks) and found.cpu is not with_gpus
    for node in {p.node for p in places}:
        assert sum(p.cpus for p in places if p.node == node) <= node.cpus
    assert all(bool(p.cpus) == with_gpus for p in places)

    head, tp = found.ranks[0].node.name, c.actor.tensor_model_parallel_size
    stages = c.actor.pipeline_model_parallel_size
    senders = [found.ranks[stage * c.world_size // stages].node.name for stage in range(stages)] * WEIGHT_GROUPS
    listening = [(head, found.controller.port), (head, found.meeting_port)]
    listening += zip(senders, found.push_ports, strict=True)
    listening += [(e.node.name, port) for e in found.engines for port in (e.port, e.nccl_port)]
    assert len(listening) == len(set(listening)) and all(port in PORTS for _, port in listening)

    if not with_gpus or any(node.gpus >= tp for node in trainer):
        for first in range(0, c.world_size, tp):
            assert len({r.node for r in found.ranks[first : first + tp]}) == 1
    order = [trainer.index(r.node) for r in found.ranks]
    assert order == sorted(order)
    of_node = Counter(r.node for r in found.ranks)
    for node, count in of_node.items():
        assert [r.local_rank for r in found.ranks if r.node == node] == list(range(count))
        assert {r.local_world for r in found.ranks if r.node == node} == {count}


def blocks(c, gpus):
    """(GPUs that must be together, how many such blocks) of engines and trainer."""
    tp = c.actor.tensor_model_parallel_size
    size = tp if tp <= gpus else 1
    return (c.engine.tensor_parallel_size, c.engine.replicas), (size, c.world_size // size)


def fits(demands, count, gpus):
    """Whether `demands` fit on `count` nodes, by trying every way to fill one."""
    (a, m), (b, n) = demands
    best = {0: 0}  # blocks of a placed -> the most blocks of b beside them
    for _ in range(count):
        after = {}
        for done, beside in best.items():
            for i in range(gpus // a + 1):
                total, others = min(m, done + i), beside + (gpus - i * a) // b
                after[total] = max(after.get(total, 0), others)
        best = after
    return best.get(m, -1) >= n


@pytest.mark.parametrize("gpus", range(5))
@pytest.mark.parametrize("count", range(1, 5))
def test_every_small_cluster_together(count, gpus):
    there = nodes(count, gpus)
    for c in CONFIGS:
        try:
            found = place(c, there, there, PORTS)
        except ConfigError as e:
            assert gpus and not fits(blocks(c, gpus), count, gpus) and "\n" not in str(e), (c.engine, c.actor)
        else:
            check(found, c, there, there)
            assert not gpus or fits(blocks(c, gpus), count, gpus)


@pytest.mark.parametrize("gpus", range(5))
@pytest.mark.parametrize(("count", "engine_nodes"), [(n, k) for n in range(2, 5) for k in range(1, n)])
def test_every_small_cluster_apart(count, engine_nodes, gpus):
    trainer, engines = split(nodes(count, gpus), engine_nodes)
    assert (len(trainer), len(engines)) == (count - engine_nodes, engine_nodes)
    for c in CONFIGS:
        (engine_size, replicas), (size, groups) = blocks(c, gpus)
        room = not gpus or (gpus // engine_size * len(engines) >= replicas and gpus // size * len(trainer) >= groups)
        try:
            found = place(c, trainer, engines, PORTS)
        except ConfigError as e:
            assert not room and "\n" not in str(e), (c.engine, c.actor)
        else:
            assert room
            check(found, c, trainer, engines)


def test_one_box_of_eight():
    (box,) = nodes(1, 8, cpus=90)
    found = place(config(replicas=2, engine_tp=2, tp=4), [box], [box], PORTS)
    assert [r.devices for r in found.ranks] == [(0,), (1,), (2,), (3,)]
    assert [e.devices for e in found.engines] == [(4, 5), (6, 7)]
    assert [r.cpus for r in found.ranks] == [10] * 4 and [e.cpus for e in found.engines] == [20, 20]
    assert (found.controller.devices, found.controller.cpus) == ((), 10)
    assert found.controller.link == "tcp://10.0.0.1:20000".replace("20000", str(PORTS[0]))
    assert found.urls == [f"http://10.0.0.1:{PORTS[2]}", f"http://10.0.0.1:{PORTS[4]}"]
    assert [e.nccl_port for e in found.engines] == [PORTS[3], PORTS[5]] and found.meeting_port == PORTS[1]
    assert found.push_ports == (PORTS[63], PORTS[62], PORTS[61], PORTS[60])
    # The larger group first: it begins at a multiple of its size.
    found = place(config(engine_tp=4, tp=2, dp=2), [box], [box], PORTS)
    assert found.engines[0].devices == (0, 1, 2, 3) and [r.devices for r in found.ranks] == [(4,), (5,), (6,), (7,)]


def test_sixteen_nodes_of_eight():
    """32B: TP8 PP2 DP4 on 8 nodes, 16 engines of 4 on the others."""
    trainer, engines = split(nodes(16, 8, cpus=128), 8)
    found = place(config(replicas=16, engine_tp=4, tp=8, pp=2, dp=4), trainer, engines, PORTS)
    assert [(r.node.name, r.local_rank) for r in found.ranks] == [(f"n{i}", k) for i in range(8) for k in range(8)]
    assert [r.devices for r in found.ranks[:9]] == [(k,) for k in range(8)] + [(0,)]
    assert [e.node.name for e in found.engines] == [f"n{8 + i // 2}" for i in range(16)]
    assert [e.devices for e in found.engines[:2]] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert {(e.port, e.nccl_port) for e in found.engines} == {(PORTS[2], PORTS[3]), (PORTS[4], PORTS[5])}
    assert found.push_ports[:2] == (PORTS[63], PORTS[62]) and len(found.push_ports) == 8
    assert (found.ranks[0].cpus, found.ranks[8].cpus, found.engines[0].cpus) == (14, 16, 64)
    # Without one engine node and with a spare one: the rest stays where it was.
    again = place(config(replicas=14, engine_tp=4, tp=8, pp=2, dp=4), trainer, engines[:7], PORTS)
    assert again.ranks == found.ranks and again.engines == found.engines[:14]


def test_engines_alone():
    found = place_engines(config(replicas=2, engine_tp=2).engine, nodes(1, 4), PORTS)
    assert [(e.name, e.devices, e.port) for e in found] == [
        ("engine-0", (0, 1), PORTS[2]),
        ("engine-1", (2, 3), PORTS[4]),
    ]
    with pytest.raises(ConfigError, match="32 engines on one node .* need 66 ports"):
        place_engines(config(replicas=32).engine, nodes(1, 0), PORTS)


def test_cpu_nodes_are_filled_evenly():
    found = place(config(replicas=3, engine_tp=2, tp=2, dp=3), nodes(2, 0), nodes(2, 0), PORTS)
    assert [r.node.name for r in found.ranks] == ["n0"] * 4 + ["n1"] * 2
    assert [e.node.name for e in found.engines] == ["n0", "n0", "n1"]
    assert found.cpu and not any(p.devices or p.cpus for p in [*found.engines, *found.ranks, found.controller])


def test_ranks_alone():
    actor = config(tp=2, dp=2).actor
    assert [r.devices for r in place_ranks(actor, nodes(1, 8))] == [(0,), (1,), (2,), (3,)]
    assert [(r.devices, r.local_rank) for r in place_ranks(actor, nodes(1, 0))] == [((), i) for i in range(4)]
    with pytest.raises(ConfigError, match=r"4 trainer ranks .* n0 has 3 free of 3"):
        place_ranks(actor, nodes(1, 3))


@pytest.mark.parametrize(
    ("made", "trainer", "engines", "says"),
    [
        (config(engine_tp=8), nodes(1, 4), nodes(1, 4), "engine.tensor_parallel_size=8 needs 8 GPUs inside one node"),
        (config(replicas=3, engine_tp=4), nodes(1, 8), nodes(1, 8), "engine.replicas=3 engines need 3 times 4 GPUs"),
        (config(tp=4, dp=3), nodes(1, 8), nodes(4, 8), "12 trainer ranks .* need 3 times 4 GPUs .* has 8 free of 8"),
        (config(), nodes(1, 1), nodes(1, 1), "engine.replicas=1 engines need 1 times 1 GPUs .* n0 has 0 free of 1"),
        (config(), nodes(2, 0)[:1], nodes(2, 4)[1:], "1 trainer ranks"),
        (config(), nodes(2, 4)[:1], nodes(2, 0)[1:], "engine.replicas=1 engines need"),
        (config(), [], nodes(1, 1), "have no node"),
        (
            config(replicas=30),
            nodes(1, 0),
            nodes(1, 0),
            "and 1 pipeline stages need 66 ports.*: spread engine.replicas",
        ),
        (config(pp=16), nodes(1, 0), nodes(1, 0), "1 engines on one node .* need 68 ports.*: lower actor.pipeline"),
    ],
)
def test_what_does_not_fit_is_one_line(made, trainer, engines, says):
    with pytest.raises(ConfigError, match=says) as e:
        place(made, trainer, engines, PORTS)
    assert "\n" not in str(e.value)


def test_engines_leave_a_node_for_the_trainer():
    there = nodes(3, 8)
    assert split(there, None) == (there, there) and split(there, 1) == (there[:2], there[2:])
    with pytest.raises(ConfigError, match="launch.engine_nodes=3 leaves no node for the trainer, there are 3"):
        split(there, 3)


def test_of_two_groups_the_first_trains_and_the_second_generates():
    a, b = nodes(3, 8)[:2], nodes(3, 8)[2:]
    assert sides([a, b], None) == (a, b) and sides([a], 1) == (a[:1], a[1:])
    with pytest.raises(ConfigError, match="a heterogeneous job has 2 groups, trainer and engines; this one has 3"):
        sides([a, b, b], None)


def test_ports_of_jobs():
    assert ports_needed(27, 2) == 64
    PortMap(job_ports(20000, 1)).require(27, 2)
    with pytest.raises(ConfigError, match="28 engines on one node and 2 pipeline stages need 66 ports, a job has 64"):
        PortMap(job_ports(20000, 1)).require(28, 2)
    ranges = [job_ports(20000, job) for job in range(1000, 1199)]
    assert len({port for r in ranges for port in r}) == 199 * 64
    assert min(r[0] for r in ranges) == 20000 and max(r[-1] for r in ranges) < 32768
    assert job_ports(20000, 1000) == job_ports(20000, 1199) == job_ports(20000, 1000 + 199 * 5)
    assert [job_ports(32704, job)[0] for job in (1, 2)] == [32704, 32704]
    with pytest.raises(ConfigError, match="launch.base_port=32705 leaves 63 ports"):
        job_ports(32705, 1)
