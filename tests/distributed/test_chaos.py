"""A real job that is killed at bad moments goes on each time, with nothing lost, doubled or corrupt."""

import os
import random

import pytest

from benchmarks.chaos import check, live
from benchmarks.faults import BETWEEN, FAULTS, Job, small_disk
from dapo_megatron.observe.metrics import read_metrics
from dapo_megatron.run_folder import RunFolder
from tests.launch.conftest import recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BY_NAME = {fault.name: fault for fault in (*FAULTS, *BETWEEN)}
CHOSEN = ["kill -9 of a rank during a save", "kill -9 of the engine during a push", "disk full"]
if os.environ.get("LAYOUTS") == "all":
    CHOSEN = list(BY_NAME)


def test_a_job_survives_its_faults(tmp_path):
    path = recipe(tmp_path, checkpoint={"every": 1, "keep_last": 3}, evaluation={"every": 1000})
    with small_disk(tmp_path, 48 if len(CHOSEN) < len(BY_NAME) else 128) as disk:  # damaged ones are kept aside
        job = Job(path, RunFolder((disk or tmp_path) / "run"), [], disk)
        for name in CHOSEN:
            if disk is not None or not BY_NAME[name].needs_small_disk:
                live(job, BY_NAME[name], random.Random(name))
        steps = int(read_metrics(job.folder)[-1]["step"]) + 1
        job.start(f"trainer.steps={steps}")
        job.finish(0)
        check(job.folder)
        assert len(read_metrics(job.folder)) == steps + 1
        # Told in one line, and the disk that was full is usable again.
        assert (job.folder.path / "report.html").exists()
