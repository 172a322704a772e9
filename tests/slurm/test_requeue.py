"""A job of a real SLURM puts itself back into the queue, and comes back; nothing else of a run is started."""

import sys

import pytest

from tests.slurm.cluster import REPOSITORY
from tests.slurm.test_jobs import by_make_test_slurm

CODE = """
import os
import sys
from pathlib import Path
from dapo_megatron.run_folder import RunFolder
from launch.allocation import find_allocation
from launch.requeue import requeue
from launch.states import Requeue

allocation, folder = find_allocation(os.environ), RunFolder(Path(sys.argv[1]))
print([node.name for node in allocation.nodes], flush=True)
if not allocation.restarts:
    folder.snapshot(allocation.job_id).mkdir(parents=True)
    requeue(allocation, folder, Requeue("it failed", tuple(sys.argv[2:]), True), 3600.0)
"""


def nodes_of_both_starts(cluster, name, bad, *options):
    """(nodes of the first start, nodes of the second) of a job that goes back without some nodes; and its log."""
    code, folder = cluster.shared / "code.py", cluster.shared / name
    code.write_text(CODE)
    script = f"export PYTHONPATH={REPOSITORY}\nexec {sys.executable} {code} {folder} {' '.join(bad)}"
    job = cluster.sbatch(script, "--requeue", "--open-mode=append", *options)
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=90)
    assert ended["JobState"] == "COMPLETED", cluster.output(job)
    log = folder / "logs" / "launcher.log"
    starts = [eval(line) for line in cluster.output(job).splitlines() if line.startswith("[")]
    return starts, log.read_text() if log.exists() else ""


def test_a_job_comes_back_without_bad_nodes_and_those_that_its_user_excludes(cluster):
    starts, log = nodes_of_both_starts(cluster, "joined", ["node3"], "--nodes=2", "--exclude=node2")
    assert len(starts) == 2 and starts[1] == ["node1", "node4"] and not log


def test_each_group_of_a_heterogeneous_job_keeps_what_its_user_excludes(cluster):
    groups = ("--nodes=1", "--exclude=node1", ":", "--nodes=1", "--exclude=node3,node4")
    starts, log = nodes_of_both_starts(cluster, "groups", ["node2"], *groups)
    assert starts == [["node2", "node1"], ["node3", "node1"]] and not log


def test_a_job_that_needs_all_nodes_comes_back_on_all(cluster):
    starts, log = nodes_of_both_starts(cluster, "all", ["node2"], "--nodes=4")
    assert starts == [["node1", "node2", "node3", "node4"]] * 2
    assert "node2 failed, and not excluded: too few nodes would be left for the job" in log


ENDING = """
import os
import signal
import time
from launch.ending import ending

job, asked = int(os.environ["SLURM_JOB_ID"]), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print(ending(job), flush=True)
while not asked:
    time.sleep(0.1)
print(ending(job), flush=True)
"""


def endings(cluster, end, *options):
    """What a job learns at its beginning and at its SIGTERM."""
    (cluster.shared / "ending.py").write_text(ENDING)
    script = f"export PYTHONPATH={REPOSITORY}\nexec {sys.executable} {cluster.shared}/ending.py"
    job = cluster.sbatch(script, "--open-mode=append", *options)

    def said():
        return [
            line
            for line in cluster.output(job).splitlines()
            if line in ("None", "time limit", "cancelled or preempted")
        ]

    cluster.wait_until(said, 30, "the job to begin")
    end(job)
    cluster.wait_until(lambda: len(said()) > 1, 150, "SIGTERM")
    return said()


def test_a_cancelled_job_knows_why_it_ends(cluster):
    assert endings(cluster, lambda job: cluster.run("scancel", str(job))) == ["None", "cancelled or preempted"]


@by_make_test_slurm
@pytest.mark.parametrize("options", [("--time=1",), ("--time=1", ":", "--time=1")])
def test_a_job_at_its_time_limit_knows_why_it_ends(cluster, options):
    assert endings(cluster, lambda job: None, *options) == ["None", "time limit"]
