"""A trainer rank has the launcher's environment, and its own place."""

import json
import sys

import pytest

from dapo_megatron.config import ActorConfig
from dapo_megatron.errors import DapoError
from launch.processes import ProcessGroup
from launch.ranks import start_ranks, wait_for_ranks
from launch.topology import Node, place_ranks

FAILS = """
import os, sys
print("a warning\\nerror: the first", file=sys.stderr)
print("error: rank", os.environ["RANK"], "has no model", file=sys.stderr)
print("[W1127] a library says goodbye", file=sys.stderr)
sys.exit(1)
"""
SHOW = "import json, os, sys; print(json.dumps(dict(os.environ)))"


def test_ranks_have_the_environment_and_their_place(tmp_path, monkeypatch):
    (tmp_path / "shows.py").write_text(SHOW)
    environment = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3", "RANK": "99"}
    places = place_ranks(ActorConfig(data_parallel_size=2), [Node("here", "127.0.0.1", 0, 2)])
    # Not as a context manager: its end is the end of every child of this process, other tests' among them.
    ranks = start_ranks(ProcessGroup(tmp_path), "rank", "shows", [], places, 4711, environment)
    assert [rank.process.wait(30) for rank in ranks] == [0, 0]
    for number, rank in enumerate(ranks):
        found = json.loads(rank.log.read_text())
        assert (rank.name, found["RANK"], found["LOCAL_RANK"]) == (f"rank-{number}", str(number), str(number))
        assert (found["WORLD_SIZE"], found["MASTER_PORT"], found["CUDA_VISIBLE_DEVICES"]) == ("2", "4711", "3")
        assert rank.process.args[0] == sys.executable


@pytest.mark.parametrize(("program", "says"), [(FAILS, "the replay failed: rank 0 has no model"), ("1 / 0", "ZeroDiv")])
def test_a_rank_that_fails_is_told_in_its_own_line(tmp_path, program, says):
    (tmp_path / "fails.py").write_text(program)
    places = place_ranks(ActorConfig(), [Node("here", "127.0.0.1", 0, 1)])
    ranks = start_ranks(ProcessGroup(tmp_path), "rank", "fails", [], places, 4711, {"PYTHONPATH": str(tmp_path)})
    with pytest.raises(DapoError) as e:
        wait_for_ranks(ranks, "the replay", 30, lambda: None)
    assert str(e.value) == says if program == FAILS else says in str(e.value)
