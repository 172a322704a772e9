"""What each process sees: its own devices and no others, and what a group's members must share."""

from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.run_folder import RunFolder
from launch.commands import command_of_controller, command_of_engine, command_of_rank
from launch.environment import environment_of_rank, shared_environment, visible_devices
from launch.job import Job
from launch.topology import Node, place
from tests.tiny import run_config


def commands(gpus, base, *, interface=None, **sections):
    """Every process of a job on one node."""
    config, node = run_config("model", **sections), Node("box", "10.0.0.1", gpus, 64)
    placement = place(config, [node], [node], range(20000, 20064))
    shared = shared_environment(config, base, cpu=placement.cpu, interface=interface)
    job = Job(Path("run/config.yaml"), ["--resume", "step"])
    folder = RunFolder(Path("run"))
    engines = [command_of_engine(config, folder, e, shared) for e in placement.engines]
    ranks = [command_of_rank(job, placement, r.rank, shared) for r in placement.ranks]
    return engines, command_of_controller(job, placement, shared), ranks


EIGHT = {"engine": {"replicas": 2, "tensor_parallel_size": 2}, "actor": {"tensor_model_parallel_size": 4}}


def test_on_a_box_of_eight_every_gpu_is_seen_by_one_process():
    engines, controller, ranks = commands(8, {"PATH": "p"}, **EIGHT)
    seen = [c.environment["CUDA_VISIBLE_DEVICES"] for c in (*ranks, *engines, controller)]
    assert seen == ["0", "1", "2", "3", "4,5", "6,7", ""]
    assert [r.environment["LOCAL_RANK"] for r in ranks] == ["0"] * 4
    assert [r.environment["RANK"] for r in ranks] == ["0", "1", "2", "3"]
    for process in (*engines, controller, *ranks):
        assert process.environment["NCCL_CUMEM_ENABLE"] == process.environment["NCCL_NVLS_ENABLE"] == "0"
        assert "OMP_NUM_THREADS" not in process.environment and "GLOO_SOCKET_IFNAME" not in process.environment
        assert "SGLANG_USE_CPU_ENGINE" not in process.environment and process.environment["PATH"] == "p"


def test_no_two_engines_draw_the_same_random_numbers():
    """Copies of one prompt on two engines that run in step would get the same responses."""
    engines, _, _ = commands(8, {}, engine={"replicas": 3, "seed": 2**31 - 2})
    assert [e.arguments[e.arguments.index("--random-seed") + 1] for e in engines] == ["2147483646", "2147483647", "0"]


def test_what_the_job_sees_is_shared_out_by_its_names():
    engines, _, ranks = commands(8, {"CUDA_VISIBLE_DEVICES": "8,9,GPU-a,GPU-b,1,2,3,4"}, **EIGHT)
    assert [c.environment["CUDA_VISIBLE_DEVICES"] for c in (*ranks, *engines)] == [
        "8", "9", "GPU-a", "GPU-b", "1,2", "3,4",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=0,1 shows 2 GPUs, a process was given number 2"):
        visible_devices((1, 2), "0,1")
    assert visible_devices((), "") == visible_devices((), None) == ""


def test_users_choice_for_nccl_holds_on_both_sides():
    engines, _, ranks = commands(8, {"NCCL_CUMEM_ENABLE": "1"}, interface="ib0", **EIGHT)
    for process in (*engines, *ranks):
        assert process.environment["NCCL_CUMEM_ENABLE"] == "1"
        assert process.environment["GLOO_SOCKET_IFNAME"] == "ib0"
        assert process.environment["NCCL_SOCKET_IFNAME"] == "=ib0"


def test_on_cpu_nothing_is_said_of_devices():
    engines, controller, ranks = commands(0, {"CUDA_VISIBLE_DEVICES": "5"}, **EIGHT)
    for process in (*engines, controller, *ranks):
        assert process.environment["OMP_NUM_THREADS"] == "1" and process.environment["CUDA_VISIBLE_DEVICES"] == "5"
        assert process.environment["THP_MEM_ALLOC_ENABLE"] == "1"
        assert "NCCL_CUMEM_ENABLE" not in process.environment and "PYTHONHASHSEED" not in process.environment
    assert engines[0].environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert [r.environment["LOCAL_RANK"] for r in ranks] == ["0", "1", "2", "3"]
    engines, controller, ranks = commands(0, {}, engine={"deterministic": True})
    assert {c.environment["PYTHONHASHSEED"] for c in (*engines, controller, *ranks)} == {"0"}


def test_command_lines_agree_on_ports():
    engines, controller, ranks = commands(0, {}, engine={"replicas": 2}, actor={"pipeline_model_parallel_size": 2})
    links = ["--config", "run/config.yaml", "--link", "tcp://10.0.0.1:20000"]
    assert controller.arguments[1:] == ["-m", "dapo_megatron.rollout", *links]
    tail = ["--push-ports", *map(str, range(20063, 20055, -1)), "--resume", "step"]
    assert ranks[0].arguments[1:] == ranks[1].arguments[1:] == ["-m", "dapo_megatron.trainer", *links, *tail]
    for k, engine in enumerate(engines):
        options = dict(zip(engine.arguments, engine.arguments[1:], strict=False))
        assert (options["--host"], options["--port"]) == ("10.0.0.1", str(20002 + 2 * k))
        assert options["--nccl-port"] == str(20003 + 2 * k)
    names = [c.name for c in (*engines, controller, *ranks)]
    assert names == ["engine-0", "engine-1", "controller", "trainer-0", "trainer-1"]


def test_ranks_of_two_nodes_meet_on_the_first():
    config = run_config("model", actor={"data_parallel_size": 3})
    nodes = [Node(f"n{i}", f"10.0.0.{i}", 2, 8) for i in range(3)]
    ranks = place(config, nodes[:2], nodes[2:], range(20000, 20064)).ranks
    found = [environment_of_rank({}, ranks, rank, 20001) for rank in range(3)]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["WORLD_SIZE"]) for e in found} == {("10.0.0.0", "20001", "3")}
    assert [(e["RANK"], e["LOCAL_WORLD_SIZE"], e["CUDA_VISIBLE_DEVICES"]) for e in found] == [
        ("0", "2", "0"), ("1", "2", "1"), ("2", "1", "0"),
    ]  # fmt: skip
