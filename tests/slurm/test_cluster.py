"""The cluster that the other tests stand on does what a cluster does, and leaves nothing behind."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.folders import remove_abandoned


def lines(text):
    return sorted(text.split())


def test_a_step_runs_on_every_node(cluster):
    assert lines(cluster.run("srun", "--nodes=4", "hostname")) == ["node1", "node2", "node3", "node4"]


def test_nodes_reach_each_other_by_name_and_nobody_else(cluster):
    where = cluster.run("getent", "hosts", "node2", node="node1").split()
    assert where[-1] == "node2" and where[0].endswith("10.77.0.2")
    assert "eth0" in cluster.run("ip", "route", "get", "10.77.0.2", node="node1")
    with pytest.raises(RuntimeError, match="unreachable"):
        cluster.run("ip", "route", "get", "1.1.1.1", node="node1")
    assert socket.gethostname() not in ("login", *cluster.nodes)


def test_temporary_files_and_shared_memory_are_a_nodes_own(cluster):
    mine = cluster.folder.name
    cluster.run("touch", f"/tmp/{mine}", f"/dev/shm/{mine}", f"{cluster.shared}/ours", node="node1")
    seen = cluster.run("bash", "-c", f"ls /tmp /dev/shm {cluster.shared}", node="node2").split()
    assert "ours" in seen and mine not in seen
    assert not Path("/tmp", mine).exists() and not Path("/dev/shm", mine).exists()


def test_a_step_gets_the_devices_it_asks_for(cluster):
    devices = cluster.run("srun", "--nodes=1", "--gpus-per-node=3", "printenv", "CUDA_VISIBLE_DEVICES")
    assert devices.strip() == "0,1,2"


def test_a_heterogeneous_job_has_groups(cluster):
    job = cluster.sbatch(
        """
        echo "groups $SLURM_HET_SIZE"
        srun --het-group=0 hostname : --het-group=1 hostname
        """,
        *("--nodes=1", ":", "--nodes=2"),
    )
    cluster.wait_for_state(job, "COMPLETED")
    said = cluster.output(job).split()
    assert said[:2] == ["groups", "2"]
    assert len(set(said[2:])) == 3


def test_a_batch_script_gets_the_signal_it_asked_for(cluster):
    job = cluster.sbatch(
        """
        trap 'echo asked; exit 0' USR1
        echo ready
        while :; do sleep 0.1; done
        """
    )
    cluster.wait_until(lambda: "ready" in cluster.output(job), 10, "the job to be ready")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait_for_state(job, "COMPLETED")
    assert "asked" in cluster.output(job)


def test_a_job_is_requeued(cluster):
    job = cluster.sbatch(
        """
        echo "start ${SLURM_RESTART_COUNT:-0}"
        [ "${SLURM_RESTART_COUNT:-0}" = 1 ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }
        """,
        *("--requeue", "--open-mode=append"),
    )
    assert cluster.wait_for_state(job, "COMPLETED")["Restarts"] == "1"
    assert "start 0" in cluster.output(job) and "start 1" in cluster.output(job)


def test_a_job_outlives_a_node_without_power_where_it_asked_to(cluster):
    job = cluster.sbatch("srun --ntasks=2 bash -c 'hostname; sleep 100'; echo step ended", "--nodes=2", "--no-kill")
    cluster.wait_until(lambda: "node2" in cluster.output(job), 10, "the step to run on node2")
    cluster.power_off("node2")
    assert list(cluster.processes()) == ["login", "node1", "node3", "node4"]
    cluster.wait_until(lambda: "step ended" in cluster.output(job), 40, "SLURM to end the step")
    cluster.power_on("node2")
    cluster.wait_until(cluster.all_idle, 30, "node2 to come back")


def test_a_cut_node_hears_nothing_and_lives(cluster):
    code = "import socket; socket.create_connection(('node3', 6818), timeout=1)"  # slurmd's port
    reach = (sys.executable, "-c", code)
    cluster.run(*reach)
    cluster.cut("node3")
    with pytest.raises(RuntimeError, match="ended with"):
        cluster.run(*reach)
    assert cluster.run("hostname", node="node3").strip() == "node3"
    cluster.heal("node3")
    cluster.run(*reach)


def test_a_command_has_a_deadline_and_leaves_nothing(cluster):
    with pytest.raises(RuntimeError, match="sleep 100 on node1 took more than 0.5 s"):
        cluster.run("sleep", "100", node="node1", timeout_s=0.5)


def test_an_orphan_is_reaped_and_what_is_left_is_seen(cluster):
    cluster.run("bash", "-c", "(setsid sleep 0.2 & setsid sleep 98 &) >/dev/null 2>&1", node="node4")
    cluster.wait_until(lambda: cluster.processes()["node4"] == ["sleep 98"], 5, "the first orphan to end")
    assert not cluster.run("bash", "-c", "grep -ls ^State:.Z /proc/[0-9]*/status", node="node4", check=False)
    with pytest.raises(AssertionError, match="node4.*sleep 98"):
        cluster.tidy()
    assert cluster.processes()["node4"] == []


def test_two_clusters_do_not_see_each_other(cluster):
    with Cluster(1) as other:
        assert other.run("srun", "hostname").strip() == "node1"
        assert other.folder != cluster.folder
        cluster.cut("node1")
        assert other.run("srun", "hostname").strip() == "node1"
        cluster.heal("node1")
    assert not other.folder.exists()
    assert cluster.run("srun", "hostname").strip() == "node1"


def test_a_killed_owner_leaves_no_node_and_the_next_start_removes_its_folder(cluster):
    code = "import time; from tests.slurm.cluster import Cluster\n"
    code += "with Cluster(1) as c: print(c.folder, flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    folder = Path(owner.stdout.readline().strip())
    inits = [int(p.read_text().split()[0]) for p in folder.glob("inits/*")]
    assert len(inits) == 2 and all(Path(f"/proc/{pid}").exists() for pid in inits)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in inits):
        assert time.monotonic() < end, "a node outlived its owner"
        time.sleep(0.05)
    assert folder.exists()
    remove_abandoned()
    assert not folder.exists() and cluster.folder.exists()
