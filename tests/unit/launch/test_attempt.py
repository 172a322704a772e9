"""What is left of a run that cannot start."""

import signal
from dataclasses import replace

import pytest

from dapo_megatron.errors import ConfigError, DataError
from dapo_megatron.process import read_exit
from dapo_megatron.run_folder import RunFolder
from launch import slurm
from launch.allocation import read_allocation
from launch.attempt import attempt
from launch.inputs import check_job_inputs
from launch.states import Requeue
from tests.tiny import run_config
from tests.unit.launch.test_allocation import recorded


@pytest.mark.parametrize(("error", "kind"), [(ConfigError, "configuration"), (DataError, "data")])
def test_a_check_that_fails_is_written_down_and_nothing_begun(tmp_path, error, kind):
    folder = RunFolder(tmp_path / "run")

    def check(config):
        assert folder.lock.exists()
        raise error("it cannot work")

    with pytest.raises(error, match="it cannot work"), attempt(run_config("nowhere"), folder, None, None, 7, check):
        raise AssertionError("it has begun")
    record = read_exit(folder, "launcher")
    assert (record.kind, record.message) == (kind, "it cannot work")
    # Another try may have other data: nothing says that the run has begun.
    assert [path.name for path in folder.path.iterdir()] == ["exits"]
    with attempt(run_config("elsewhere"), folder, None, None, 7):
        assert folder.config.exists() and read_exit(folder, "launcher") is None
    assert read_exit(folder, "launcher").kind is None


def test_what_a_slurm_job_reads_must_be_there(tmp_path):
    config = run_config("nowhere", data={"train": "nowhere.jsonl"})
    with pytest.raises(ConfigError, match="^data.train=nowhere.jsonl does not exist$"):
        check_job_inputs(config)
    (tmp_path / "train.jsonl").touch()
    config = run_config("/no/model", data={"train": str(tmp_path / "train.jsonl")})
    with pytest.raises(ConfigError, match="/no/model"):
        check_job_inputs(config)


def test_in_a_container_its_image_must_be_there_and_paths_are_its_own(tmp_path):
    image = tmp_path / "dapo.sqsh"
    container = {"runtime": "pyxis", "image": str(image)}
    config = run_config("/in/model", data={"train": "/in/train.jsonl"}, launch={"container": container})
    with pytest.raises(ConfigError, match=f"^launch.container.image={image} does not exist$"):
        check_job_inputs(config)
    image.touch()
    check_job_inputs(config)


def test_a_signal_while_the_report_is_written_ends_no_requeue(tmp_path, monkeypatch):
    asked, end = [], Requeue("the time limit is near", (), False)
    allocation = replace(read_allocation(*recorded("no_devices")), ends=None)
    for name, stand_in in {
        "find_allocation": lambda _: allocation,
        "is_in": lambda _: True,
        "address_of": lambda _: "10.0.0.1",
        "check_job_inputs": lambda _: None,
        "_supervised": lambda *_: end,
        "requeue": lambda _, folder, end, forget_s: asked.append(end),
    }.items():
        monkeypatch.setattr(slurm, name, stand_in)
    monkeypatch.setattr("launch.attempt.write_report", lambda _: signal.raise_signal(signal.SIGTERM))
    config = run_config("nowhere", data={"train": "nowhere.jsonl"}).model_copy(update={"run_dir": str(tmp_path)})
    with pytest.raises(KeyboardInterrupt):
        slurm.run_slurm(config)
    assert asked == [end]


def test_a_slurm_job_is_checked_before_its_first_step(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a step, or a requeue")

    allocation = replace(read_allocation(*recorded("no_devices")), ends=None)
    for name, stand_in in {
        "find_allocation": lambda _: allocation,
        "is_in": lambda _: True,
        "address_of": lambda _: "10.0.0.1",
        "unfit_nodes": never,
        "requeue": never,
    }.items():
        monkeypatch.setattr(slurm, name, stand_in)
    config = run_config("nowhere", data={"train": "nowhere.jsonl"}).model_copy(update={"run_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="data.train=nowhere.jsonl does not exist"):
        slurm.run_slurm(config)
    assert read_exit(RunFolder(tmp_path), "launcher").kind == "configuration"
