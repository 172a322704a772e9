"""What a job begins with."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dapo_megatron import cli
from dapo_megatron.checkpoint import store
from dapo_megatron.checkpoint.manifest import Manifest, model_numbers
from dapo_megatron.config import LaunchConfig, ModelConfig, RunConfig, load_config
from dapo_megatron.observe.jsonl import append_lines
from dapo_megatron.errors import ConfigError, StorageError
from dapo_megatron.process import Reporter, read_exit
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_config import read_model
from launch.job import Job, check_resume, prepare_new, prepare_restart, prepare_resume
from launch.local import run_local
from tests.tiny import hf_folder


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory):
    """The folder of every run's model."""
    place = hf_folder(tmp_path_factory.mktemp("job") / "hf")
    MODELS[:] = [place, hf_folder(place.with_name("other"), layers=3)]


MODELS = []


def config(run_dir, **trainer):
    tree = {
        "run_dir": str(run_dir),
        "model": {"path": str(MODELS[0])},
        "data": {"train": "t.jsonl"},
        "trainer": trainer,
    }
    return RunConfig.model_validate(tree)


def manifest(step):
    numbers = model_numbers(read_model(MODELS[0]))
    return Manifest(format="dp_reshardable", model=numbers, dtype="float32", step=step)


def checkpoint(folder, step):
    path = store.open_partial(folder, step)
    hf = folder.path / "hf"
    hf.mkdir(exist_ok=True)
    store.seal(path, manifest(step), {}, hf, b"{}")
    return store.publish(folder, step)


@pytest.fixture
def begun(tmp_path):
    """A folder in which a run has begun."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for place in (folder.statuses, folder.exits):
        place.mkdir()
    prepare_new(config(folder.path), folder, None)
    return folder


def test_before_the_first_checkpoint_a_resume_begins_again(begun, capsys):
    (begun.checkpoints / ".step_000001.partial/model").mkdir(parents=True)
    job = prepare_resume(config(begun.path), begun, "latest")
    assert job.config == begun.config and job.trainer_arguments == []
    assert "no checkpoint yet: from the beginning" in capsys.readouterr().out
    assert not list(begun.checkpoints.iterdir())


def test_a_run_from_weights_begins_again_with_the_same_weights(tmp_path, begun, monkeypatch):
    weights = checkpoint(begun, 3)
    second = RunFolder(tmp_path / "second")
    second.path.mkdir()
    monkeypatch.chdir(weights.parent)
    job = prepare_new(config(second.path), second, Path(weights.name))  # it goes on from another folder
    assert job.trainer_arguments == ["--weights", str(weights.resolve())]
    assert prepare_resume(config(second.path), second, "latest").trainer_arguments == job.trainer_arguments
    other = config(tmp_path / "third").model_copy(update={"model": ModelConfig(path=str(MODELS[1]))})
    with pytest.raises(ConfigError, match="holds a model with layers=2, the run's has 3"):
        prepare_new(other, RunFolder(tmp_path / "third"), weights)
    with pytest.raises(ConfigError, match="nothing is no checkpoint: give one"):
        prepare_new(config(tmp_path / "third"), RunFolder(tmp_path / "third"), tmp_path / "nothing")


def test_weights_that_lack_a_file_are_refused(tmp_path, begun):
    weights = checkpoint(begun, 3)
    (weights / store.CONTROLLER).unlink()
    with pytest.raises(StorageError, match=f"{store.CONTROLLER}"):
        prepare_new(config(tmp_path / "third"), RunFolder(tmp_path / "third"), weights)


def test_a_resume_goes_on_from_the_newest_and_writes_what_changed_beside(begun):
    for step in (1, 2):
        checkpoint(begun, step)
    before = begun.config.read_bytes()
    job = prepare_resume(config(begun.path, steps=7), begun, "latest")
    assert job.trainer_arguments == ["--resume", str(begun.checkpoint(2))]
    assert job.config == begun.resumed_config(1) and yaml.safe_load(job.config.read_text())["trainer"]["steps"] == 7
    assert prepare_resume(config(begun.path, steps=8), begun, "latest").config == begun.resumed_config(2)
    assert begun.config.read_bytes() == before
    for look in (check_resume, prepare_resume):
        with pytest.raises(ConfigError, match="cannot change seed"):
            look(config(begun.path).model_copy(update={"seed": 3}), begun, "latest")


def test_what_an_earlier_start_was_asked_for_is_done(begun):
    for request in (begun.stop_request, begun.save_request):
        request.touch()
    prepare_resume(config(begun.path), begun, "latest")
    assert not begun.stop_request.exists() and not begun.save_request.exists()


def test_a_restart_begins_with_the_newest_checkpoint_or_as_the_run_did(tmp_path, begun):
    weights, second = checkpoint(begun, 3), RunFolder(tmp_path / "second")
    second.path.mkdir()
    job = prepare_new(config(second.path), second, weights)
    Reporter(second, "trainer-0").ended("crash", "of the start before")
    assert prepare_restart(second, job) == job and read_exit(second, "trainer-0") is None
    path = checkpoint(second, 1)
    assert prepare_restart(second, job) == Job(job.config, ["--resume", str(path)])


def test_only_the_intact_one_is_gone_on_from_when_asked(begun, monkeypatch):
    monkeypatch.setattr(store, "check_objects", lambda model: None)  # there is no model in them
    for step in (1, 2, 3):
        checkpoint(begun, step)
    (begun.checkpoint(3) / store.CONTROLLER).write_text("{ }")
    with pytest.raises(StorageError, match="step_000002 is the newest intact one"):
        prepare_resume(config(begun.path), begun, "latest")
    job = prepare_resume(config(begun.path), begun, "latest-intact")
    assert job.trainer_arguments == ["--resume", str(begun.checkpoint(2))]
    assert [p.name for p in store.published(begun)] == ["step_000001", "step_000002"]
    shutil.rmtree(begun.checkpoint(1))
    (begun.checkpoint(2) / store.CONTROLLER).unlink()
    for look in (check_resume, prepare_resume):
        with pytest.raises(ConfigError, match="no intact checkpoint"):
            look(config(begun.path), begun, "latest-intact")


def test_a_new_attempt_does_not_take_the_weights_or_the_bank_of_the_last(tmp_path, begun):
    weights = checkpoint(begun, 3)
    second = RunFolder(tmp_path / "second")
    second.path.mkdir()
    prepare_new(config(second.path), second, weights)
    second.banks.mkdir()
    second.bank(1).write_bytes(b"groups of other weights")
    assert prepare_new(config(second.path), second, None).trainer_arguments == [] and not second.banks.exists()
    assert prepare_resume(config(second.path), second, "latest").trainer_arguments == []


@pytest.mark.parametrize("lost", ["checkpoints", "damaged"])
@pytest.mark.parametrize("resume", ["latest", "latest-intact"])
def test_records_are_not_given_up_for_want_of_checkpoints(begun, lost, resume):
    """20 steps are recorded before the second checkpoint, of step 20, is begun."""
    append_lines(begun.metrics, [{"step": 20}])
    check_resume(config(begun.path), begun, resume)
    begun.metrics.unlink()
    append_lines(begun.metrics, [{"step": step} for step in range(22 if lost == "checkpoints" else 5)])
    if lost == "damaged":
        (begun.checkpoints / ".step_000010.damaged").mkdir(parents=True)
    for look in (check_resume, prepare_resume):
        with pytest.raises(ConfigError, match="holds no checkpoint, but the run is at step"):
            look(config(begun.path), begun, resume)


@pytest.mark.parametrize("resume", ["latest", "latest-intact"])
def test_a_dry_run_of_a_resume_tells_what_the_resume_would(tmp_path, begun, resume):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="nowhere holds no run: start it without --resume"):
        check_resume(config(nowhere), RunFolder(nowhere), resume)
    assert not nowhere.exists()
    check_resume(config(begun.path), begun, resume)  # ended before its first checkpoint: it would begin again


def test_a_second_resume_says_what_it_takes_back(begun, capsys):
    checkpoint(begun, 1)
    prepare_resume(config(begun.path, steps=7), begun, "latest")
    capsys.readouterr()
    job = prepare_resume(config(begun.path), begun, "latest")
    assert job.config == begun.resumed_config(2) and load_config(job.config) == load_config(begun.config)
    assert "changed since the last start: trainer.steps: 7 -> 100" in capsys.readouterr().out
    assert "# resumed from step_000001, as the run began" in job.config.read_text()
    assert prepare_resume(config(begun.path), begun, "latest").config == job.config
    assert "changed" not in capsys.readouterr().out


def test_where_there_is_no_run_nothing_is_made(tmp_path):
    with pytest.raises(ConfigError, match="holds no run: start it without --resume"):
        run_local(config(tmp_path / "none"), resume="latest")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ({"engine_nodes": 1}, "launch.engine_nodes=1 leaves no node for the trainer, there are 1"),
        ({"interface": "ib77"}, "launch.interface=ib77 is no interface of"),
        ({"container": {"runtime": "pyxis", "image": "a"}}, "launch.container is of SLURM jobs"),
    ],
)
def test_where_processes_have_no_place_nothing_is_made(tmp_path, monkeypatch, launch, says):
    with pytest.raises(ConfigError, match=says):
        run_local(config(tmp_path / "none").model_copy(update={"launch": LaunchConfig(**launch)}))
    (tmp_path / "t.jsonl").write_text("{}\n")
    tree = {"run_dir": str(tmp_path / "none"), "model": {"path": str(MODELS[0])}, "launch": launch}
    tree["data"] = {"train": str(tmp_path / "t.jsonl"), "max_prompt_tokens": 64}
    tree |= {"rollout": {"max_response_tokens": 64}, "algorithm": {"overlong_cache": 16}}
    tree["engine"] = {"context_length": 128}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(cli, "_run_module", lambda *a: pytest.fail("went on"))  # reads the rows of the data
    refused = CliRunner().invoke(cli.app, ["run", str(tmp_path / "r.yaml"), "--dry-run"])
    assert isinstance(refused.exception, ConfigError) and says in str(refused.exception)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("holds", ["a checkpoint", "records"])
def test_a_folder_that_holds_a_run_is_refused(begun, holds):
    checkpoint(begun, 1) if holds == "a checkpoint" else append_lines(begun.metrics, [{"step": 1}])
    with pytest.raises(ConfigError, match="holds a run already"):
        prepare_new(config(begun.path), begun, None)
