"""Whole jobs on a real SLURM cluster: the first two nodes train, the last one generates; and what happens to them."""

import os
import signal
import psutil
import pytest

from benchmarks.chaos import check
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.process import read_exit
from dapo_megatron.run_folder import RunFolder
from launch.attempts import read_attempts
from launch.requeue import failures
from tests.launch.conftest import recipe
from tests.slurm.cluster import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ACTOR = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 1}
LAUNCH = {"engine_nodes": 1, "max_restarts": 2, "save_before_end_s": 0, "stop_grace_s": 20}
PLAIN = ("--nodes=3", "--requeue", "--no-kill", "--open-mode=append", "--signal=B:USR1@60")
LIFE_S = 300.0
by_make_test_slurm = pytest.mark.skipif(os.environ.get("SLURM") != "all", reason="a minute: make test-slurm runs it")


class Run:
    """A job of a run on the cluster."""

    def __init__(self, cluster, name, *options, steps=5, **sections):
        sections = {"actor": ACTOR, "launch": LAUNCH, "evaluation": {"every": 1000}} | sections
        self.cluster, self.recipe = cluster, recipe(cluster.shared / name, **sections)
        self.folder = RunFolder(self.recipe.parent / "run")
        self.submit(steps, options or PLAIN)

    def submit(self, steps, options):
        """Put it into the queue."""
        script = f"exec .venv/bin/python -m launch.slurm --recipe {self.recipe} trainer.steps={steps}"
        self.job = self.cluster.sbatch(script, f"--chdir={REPOSITORY}", *options)

    def steps(self):
        """Steps that are recorded."""
        return len(read_metrics(self.folder))

    def wait_for_steps(self, count):
        """Wait until so many are recorded, the evaluation before the first included."""
        self.cluster.wait_until(lambda: self.ended() or self.steps() >= count, LIFE_S, f"step {count}")
        assert not self.ended(), self.cluster.output(self.job)[-3000:]

    def started(self):
        """Starts of the run that are watched."""
        return len(read_attempts(self.folder))

    def ended(self):
        """Whether the job is over."""
        return self.cluster.job(self.job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def finish(self, state="COMPLETED"):
        """Wait for its end; returns what it printed."""
        self.cluster.wait_until(self.ended, LIFE_S, f"job {self.job} to end")
        said = self.cluster.output(self.job)
        assert self.cluster.job(self.job)["JobState"] == state, said[-3000:]
        self.cluster.wait_until_empty()
        if state == "COMPLETED":
            check(self.folder)
        return said

    def decisions(self):
        """The launcher's log."""
        return self.folder.journal.read_text()

    def pids(self, module):
        """{pid: node} of this job's processes that run a module."""
        found = {}
        for process, node in self.cluster.running():
            try:
                if module in process.cmdline() and str(self.folder.path) in " ".join(process.cmdline()):
                    found[process.pid] = node
            except psutil.NoSuchProcess:
                continue
        return found


class Smoke(Run):
    """slurm/dapo_smoke.sh, with a smaller model and fewer responses."""

    def submit(self, steps, options):
        home = self.recipe.parent
        arguments = [
            f"run_dir={self.folder.path}",
            f"trainer.steps={steps}",
            f"model.path={home}/model",
            f"data.train={home}/train.jsonl",
            f"data.eval={home}/eval.jsonl",
            "data.eval_limit=4",
            "rollout.prompts_per_step=4",
            "rollout.group_size=4",
            "trainer.mini_batch_prompts=2",
            "algorithm.dynamic_sampling=false",  # an untrained model gets nothing right
        ]
        if ":" in options:
            arguments.append("launch.engine_nodes=null")
        script = (REPOSITORY / "slurm" / "dapo_smoke.sh").read_text()
        self.job = self.cluster.sbatch(script, f"--chdir={REPOSITORY}", *options, arguments=arguments)


def test_the_smoke_script_ends_well(cluster):
    run = Smoke(cluster, "plain", "--nodes=3", steps=3)
    said = run.finish()
    assert "step 3/3" in said and "report: " in said
    hosts = {p.stem: p.read_text() for p in run.folder.statuses.glob("*.json")}
    assert all(f'"host":"{node}"' in hosts[name] for name, node in [("trainer-0", "node1"), ("trainer-1", "node2")])
    assert "http://10.77.0.3:" in run.folder.engine_set.read_text()
    assert oct(run.folder.keys.stat().st_mode)[-3:] == "600"


@by_make_test_slurm
@pytest.mark.parametrize("options", [("--nodes=4",), ("--nodes=2", ":", "--nodes=1"), ("--nodes=2", ":", "--nodes=2")])
def test_the_smoke_script_on_other_nodes(cluster, options):
    run = Smoke(cluster, f"smoke{len(options)}{options[-1][-1]}", *options, steps=3)
    run.finish()
    engine = 4 if options == ("--nodes=4",) else 3
    assert f"http://10.77.0.{engine}:" in run.folder.engine_set.read_text()


@by_make_test_slurm
def test_before_the_time_limit_a_job_saves_and_comes_back(cluster):
    run = Run(cluster, "limit", steps=12)
    run.wait_for_steps(3)
    snapshot = run.folder.snapshot(run.job)
    assert "exec .venv/bin/python -m launch.slurm" in (snapshot / "script.sh").read_text()
    code = snapshot / "code" / "launch" / "slurm.py"
    code.write_text(f"print('from the snapshot', flush=True)\n{code.read_text()}")
    run.recipe.write_text("run_dir: [")  # somebody edits it for the next job
    cluster.run("scancel", "--batch", "--signal=USR1", str(run.job))
    said = run.finish()
    assert cluster.job(run.job)["Restarts"] == "1" and said.count("from the snapshot") == 1
    assert run.folder.logs.resolve() == run.folder.attempt_logs(2)
    assert "SIGUSR1: the time limit is near" in run.decisions() and "resume from" in said


@by_make_test_slurm
def test_a_preempted_job_comes_back(cluster):
    run = Run(cluster, "preempted", steps=12)
    run.wait_for_steps(3)
    cluster.sbatch("sleep 5", "--partition=urgent", "--nodes=4", "--exclusive")
    run.finish()
    assert cluster.job(run.job)["Restarts"] == "1"


@by_make_test_slurm
@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("sglang.launch_server", "-> start engine-0"),
        ("dapo_megatron.trainer", "-> start controller and trainer"),
        ("dapo_megatron.rollout", "-> start controller and trainer"),
    ],
)
def test_what_is_killed_is_started_again(cluster, module, says):
    run = Run(cluster, module, steps=8)
    run.wait_for_steps(3)
    os.kill(min(run.pids(module)), signal.SIGKILL)
    run.finish()
    assert says in run.decisions()


@by_make_test_slurm
@pytest.mark.parametrize("accident", ["power_off", "cut"])
@pytest.mark.parametrize(("node", "role"), [("node4", "engine"), ("node2", "trainer")])
def test_a_spare_node_takes_over_from_a_lost_one(cluster, accident, node, role):
    run = Run(cluster, f"{accident}-{role}", "--nodes=4", *PLAIN[1:], steps=10)
    run.wait_for_steps(3)
    getattr(cluster, accident)(node)
    run.finish()
    assert ("start engine-0" if role == "engine" else "start controller and trainer") in run.decisions()
    assert ("http://10.77.0.3:" in run.folder.engine_set.read_text()) == (role == "engine")
    assert ("trainer ranks on node1, node3" in run.decisions()) == (role == "trainer")


@by_make_test_slurm
def test_of_a_heterogeneous_job_a_spare_node_of_the_group_takes_over(cluster):
    each = ("--nodes=2", *PLAIN[1:])
    run = Run(cluster, "spare-of-group", *each, ":", *each, steps=10, launch=LAUNCH | {"engine_nodes": None})
    run.wait_for_steps(3)
    cluster.power_off("node3")
    run.finish()
    assert "start engine-0" in run.decisions() and "http://10.77.0.4:" in run.folder.engine_set.read_text()
    assert cluster.job(run.job)["Restarts"] == "0"


@by_make_test_slurm
def test_without_a_spare_node_the_job_comes_back_elsewhere(cluster):
    run = Run(cluster, "elsewhere", steps=10)
    run.wait_for_steps(3)
    cluster.power_off("node3")
    run.finish()
    assert "back into the queue without node3" in run.decisions()
    assert "http://10.77.0.4:" in run.folder.engine_set.read_text()


@by_make_test_slurm
def test_the_batch_host_dies(cluster):
    run = Run(cluster, "batch-host", steps=10)
    run.wait_for_steps(3)
    cluster.power_off("node1")
    run.finish()
    assert int(cluster.job(run.job)["Restarts"]) == 1
    assert "node1 is lost, and the launcher with it -> back into the queue" in run.decisions()


@by_make_test_slurm
def test_a_cancelled_job_leaves_nothing(cluster):
    run = Run(cluster, "cancelled", steps=1000)
    run.wait_for_steps(3)
    cluster.run("scancel", str(run.job))
    run.finish("CANCELLED")


@by_make_test_slurm
def test_a_node_that_does_not_see_the_run_folder_is_named(cluster):
    run_dir = cluster.shared / "hidden" / "run"
    run_dir.mkdir(parents=True)
    cluster.run("mount", "-t", "tmpfs", "tmpfs", str(run_dir), node="node2")
    run = Run(cluster, "hidden")
    said = run.finish("FAILED")
    cluster.run("umount", str(run_dir), node="node2")
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"run_dir={run_dir} is not the same folder on every node (node2: No such file or directory" in line


@by_make_test_slurm
def test_a_stopped_engine_is_replaced(cluster):
    run = Run(cluster, "stopped", steps=8, engine={"call_timeout_s": 10}, launch=LAUNCH | {"engine_timeout_s": 10})
    run.wait_for_steps(3)
    os.kill(min(run.pids("sglang.launch_server")), signal.SIGSTOP)
    run.finish()
    assert "hangs: it has not answered for 1" in run.decisions() and "-> start engine-0" in run.decisions()


@by_make_test_slurm
def test_what_a_person_must_mend_is_one_line(cluster):
    run = Run(cluster, "wrong", model={"path": "/nowhere"})
    said = run.finish("FAILED")
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "/nowhere" in line and read_exit(run.folder, "launcher").kind == "configuration"
    assert cluster.job(run.job)["Restarts"] == "0" and not run.folder.step("engine-0").parent.exists()


@by_make_test_slurm
def test_starts_that_get_no_step_further_use_up_the_requeues(cluster):
    """The engine never comes up: nothing is trained, and every end is the launcher's alone."""
    sleeper = cluster.shared / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    run = Run(cluster, "nowhere", engine={"python": str(sleeper)}, launch=LAUNCH | {"max_requeues": 1})
    for restarts in ("0", "1"):
        cluster.wait_until(lambda n=restarts: run.started() == int(n) + 1, LIFE_S, "the launcher to watch")
        assert cluster.job(run.job)["Restarts"] == restarts
        cluster.run("scancel", "--batch", "--signal=USR1", str(run.job))
    said = run.finish("FAILED")
    assert "stopped: SIGUSR1: the time limit is near" in said and failures(run.folder, run.job) == 1
    assert run.decisions().count("-> back into the queue") == 1
