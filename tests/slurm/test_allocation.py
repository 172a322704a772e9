"""A batch script learns from a real SLURM what its job has."""

import sys

import pytest

CODE = "import os; from launch.allocation import find_allocation; print(find_allocation(os.environ))"
PYTHON = f"{sys.executable} -c '{CODE}'"


def told(cluster, *options):
    job = cluster.sbatch(PYTHON, *options)
    cluster.wait_for_state(job, "COMPLETED")
    return job, cluster.output(job).strip()


def test_a_plain_job(cluster):
    job, seen = told(cluster, "--nodes=3", "--gres=gpu:8", "--cpus-per-task=4")
    nodes = ", ".join(f"Node(name='node{k}', cpus=4, gpus=8)" for k in (1, 2, 3))
    assert seen.startswith(
        f"Allocation(job_id={job}, restarts=0, groups=(Group(job_id={job}, nodes=({nodes})),), can_requeue=True, ends=1"
    )


def test_a_heterogeneous_job(cluster):
    job, seen = told(cluster, "--nodes=1", "--gres=gpu:2", ":", "--nodes=2", "--cpus-per-task=3")
    assert f"Group(job_id={job}, nodes=(Node(name='node1', cpus=1, gpus=2),))" in seen
    nodes = ", ".join(f"Node(name='node{k}', cpus=3, gpus=0)" for k in (2, 3))
    assert f"Group(job_id={job + 1}, nodes=({nodes}))" in seen


def test_what_slurm_refuses_is_told_in_one_line(cluster):
    with pytest.raises(
        RuntimeError, match="DapoError: `scontrol --details show job 999` failed: slurm_load_jobs error"
    ):
        cluster.run("env", "SLURM_JOB_ID=999", sys.executable, "-c", CODE)
