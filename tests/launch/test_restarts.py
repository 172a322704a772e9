"""What dies in the midst of a run is started again, and the run goes on: an engine alone, the training beside it."""

import psutil
import pytest

from benchmarks.chaos import check
from benchmarks.faults import Job
from dapo_megatron.checkpoint.manifest import read_manifest
from dapo_megatron.checkpoint.store import latest
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def started(job, role):
    """Pids of the launcher's own children of a role."""
    return [p.pid for p in job.members(role, forks=False)]


def test_an_engine_then_a_rank_then_the_controller_die_and_the_run_goes_on(tmp_path):
    path = recipe(tmp_path, launch={"max_restarts": 2}, evaluation={"every": 1000})
    folder = RunFolder(tmp_path / "run")
    job = Job(path, folder, [], None)
    job.start("trainer.steps=1000")
    try:
        killed_again_and_again(job)
    finally:
        job.note_all()
        job.process.terminate()
        job.finish(130)
    assert job.left() == []
    check(folder)
    log = folder.journal.read_text()
    assert "the time for a stop is over" not in log
    assert read_manifest(latest(folder)).step == read_metrics(folder)[-1]["step"]
    assert read_manifest(latest(folder)).format == "fully_reshardable"
    assert log.count("-> start engine-0") == 2 and log.count("-> start controller and trainer") == 2


def killed_again_and_again(job):
    job.wait_for_steps(1)
    (engine,), ranks = started(job, "engine"), started(job, "trainer rank")
    psutil.Process(engine).kill()
    job.wait(lambda: started(job, "engine") not in ([], [engine]), "another engine")
    job.wait_for_steps(3)
    assert started(job, "trainer rank") == ranks
    (second,) = started(job, "engine")

    psutil.Process(ranks[1]).kill()
    job.wait(lambda: started(job, "trainer rank") not in ([], ranks), "other ranks")
    job.wait_for_steps(4)
    (controller,) = started(job, "controller")
    psutil.Process(controller).kill()
    job.wait(lambda: started(job, "controller") not in ([], [controller]), "another controller")
    job.wait_for_steps(5)
    assert started(job, "engine") == [second]

    # While an engine is loaded, a stop is heard.
    psutil.Process(second).kill()
    job.wait(lambda: started(job, "engine") not in ([], [second]), "a third engine")
