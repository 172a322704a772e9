"""A trainer rank has the launcher's environment, and its own place."""

import json
import sys

from dapo_megatron.config import ActorConfig
from launch.processes import ProcessGroup
from launch.ranks import start_ranks
from launch.topology import Node, place_ranks

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
