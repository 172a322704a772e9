"""What a task of a step becomes: a process with its devices, its environment and its node's limit of open files."""

import json
import os
import resource
import subprocess
import sys

import pytest

from launch.task import Task, write_step

TELLS = (
    "import json, os, resource; print(json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OWN'], "
    "resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))"
)


def told(folder, devices, seen):
    """[CUDA_VISIBLE_DEVICES, its own variable, files that it may open] of the second task of a step."""
    tasks = [Task([sys.executable, "-c", TELLS], {"OWN": own}, devices, None) for own in ("first", "second")]
    write_step(folder / "step.json", tasks)
    environment = os.environ | {"SLURM_PROCID": "1"} | ({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        [sys.executable, "-m", "launch.task", str(folder / "step.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, most)),
    )
    return json.loads(done.stdout), most


@pytest.mark.parametrize(
    ("devices", "seen", "visible"),
    [([1], None, "1"), ([0, 2], "4,5,GPU-a", "4,GPU-a"), ([], "4,5", ""), (None, "4,5", ""), (None, None, "")],
)
def test_a_task_sees_its_own_devices_and_opens_as_many_files_as_its_node_allows(
    tmp_path, monkeypatch, devices, seen, visible
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found, most = told(tmp_path, devices, seen)
    assert found == [visible, "second", most]
