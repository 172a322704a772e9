"""The status of made-up run folders, written by those who write them in a run."""

import io
import json
import os
import time
from contextlib import ExitStack, contextmanager

import pytest
import yaml

from dapo_megatron.checkpoint.manifest import FileRecord, Manifest, encode_manifest
from dapo_megatron.errors import DataError
from dapo_megatron.engines.engine_set import EngineSet, Member, write_engine_set
from dapo_megatron.observe.metrics import MetricsWriter
from dapo_megatron.process import Reporter
from dapo_megatron.run_folder import RunFolder
from launch import look, status
from launch.culprit import Condition
from launch.attempts import note_attempt, read_attempts
from launch.lock import locked
from tests.tiny import run_config
from rich.console import Console
from typer.testing import CliRunner


@pytest.fixture
def folder(tmp_path):
    """A run of two ranks after its second step of 50, with the launcher's log."""
    run = RunFolder(tmp_path / "run")
    run.logs.mkdir(parents=True)
    config = run_config(
        "nowhere", actor={"data_parallel_size": 2}, trainer={"steps": 50}, launch={"heartbeat_timeout_s": 30}
    )
    run.config.write_text(yaml.safe_dump(config.model_dump()))
    metrics = MetricsWriter(run, tensorboard=False, wandb_project=None, resume_step=None)
    for step in (1, 2):
        times = {"time/step": 5.0, "sync/seconds": 1.5, "sync/bytes": 3e9}
        metrics.write({"step": step, "version": step, "time": time.time() - 100} | times)
    write_engine_set(run, EngineSet(4, (Member("engine-0", "http://a:1", 3), Member("engine-1", "http://b:1"))))
    run.journal.write_text("2026-01-01T00:00:00+00:00 the engine-0 was killed by signal 9 -> start engine-0\n")
    return run


@contextmanager
def running(folder, controller=("generate", "1/4 kept"), trainer=("generate", ""), slurm_job=None):
    """All processes live as long as the block."""
    with ExitStack() as stack:
        stack.enter_context(locked(folder.lock, slurm_job))
        note_attempt(folder, 2, None if slurm_job is None else time.time() + 3600)
        for name, phase in (
            ("launcher", ("running", "started again: engine-0 2 times")),
            ("controller", controller),
            ("trainer-0", trainer),
            ("trainer-1", trainer),
        ):
            stack.enter_context(Reporter(folder, name)).phase(*phase)
        yield


def shown(folder, *options):
    result = CliRunner().invoke(status.app, [str(folder.path), *options])
    return result.exit_code, result.output


def silence(folder, name, seconds):
    """As if the process had been stopped so long ago."""
    os.utime(folder.status(name), (time.time() - seconds,) * 2)


def test_a_running_job(folder):
    with running(folder, slurm_job=12):
        code, text = shown(folder)
        assert code == 0
        for part in (
            "running  trainer waits for the controller, which generates: 1/4 kept, 0 s",
            "start       1, at 2",
            ", from step 2\nSLURM       job 12, until 2",
            "2 of 50, 5.0 s a step, 4 min 00 s left",
            "none yet",
            "version 2, 3 GB in 1.5 s, 1 min 4",
            "generation 4, ",
            "engine-0 http://a:1, started 3 times",
            "engine-1 http://b:1\n",
            "0 s ago",
            "-> start engine-0",
        ):
            assert part in text, (part, text)
        code, text = shown(folder, "--json")
        told = json.loads(text)
        assert code == told["exit_code"] == 0
        assert told["verdict"]["culprit"] == "controller" and told["run"]["pace"] == {"step_s": 5.0, "left_s": 240.0}
        assert [p["name"] for p in told["run"]["processes"]] == ["controller", "trainer-0", "trainer-1"]


def test_a_rank_that_hangs(folder):
    with running(folder, ("idle", ""), ("update", "")):
        pass  # they beat no more
    with locked(folder.lock), Reporter(folder, "launcher") as launcher:
        launcher.phase("running")
        for name in ("controller", "trainer-0"):
            folder.status(name).touch()
        silence(folder, "trainer-1", 31)
        code, text = shown(folder)
        assert code == 5 and "has not beaten for 31 s, in phase update" in text and "trainer-1 (pid " in text


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        (None, 4, "stopped at step 2 of 50, as the file `stop` asked"),
        ("engine", 1, "no engine is left"),
        ("preempted", 4, "no engine is left: --resume goes on"),
    ],
)
def test_a_run_that_has_ended(folder, kind, code, says):
    with running(folder):
        pass
    Reporter(folder, "launcher").ended(kind, "no engine is left")
    got, text = shown(folder)
    assert got == code and says in text
    beats = {line.split()[0]: line for line in text.splitlines() if line.startswith(("launcher ", "trainer-0 "))}
    assert (f"failed ({kind})" if kind else "ended") in beats["launcher"] and " none" in beats["trainer-0"]


def test_it_is_watched_until_it_is_over(folder, monkeypatch):
    def sleep(seconds):
        raise InterruptedError("it goes on")

    monkeypatch.setattr(status.time, "sleep", sleep)
    console = Console(file=io.StringIO(), force_terminal=True)
    with running(folder), pytest.raises(InterruptedError, match="it goes on"):
        status._watch(folder, console)
    Reporter(folder, "launcher").ended("engine", "no engine is left")
    assert status._watch(folder, console).condition is Condition.FAILED


def test_a_run_that_has_finished(folder):
    metrics = MetricsWriter(folder, tensorboard=False, wandb_project=None, resume_step=2)
    metrics.write({"step": 50, "version": 50, "time": time.time()})
    folder.exits.mkdir()
    Reporter(folder, "launcher").ended(None, "")
    code, text = shown(folder)
    assert code == 0 and "finished at step 50 of 50" in text


def test_a_job_back_in_the_queue(folder):
    with running(folder, slurm_job=12):
        with Reporter(folder, "launcher") as launcher:
            launcher.phase("requeued", "node3 is lost, and no spare host is left")
    Reporter(folder, "launcher").ended(None, "")
    code, text = shown(folder)
    assert code == 4 and "SLURM job 12 is back in the queue: node3 is lost" in text


def test_a_launcher_that_was_killed(folder, monkeypatch):
    monkeypatch.setattr(look, "FRESH_S", 1.1)
    with locked(folder.lock):
        with Reporter(folder, "launcher") as launcher:
            launcher.phase("running")
        silence(folder, "launcher", 300)
        code, text = shown(folder)
        assert code == 1 and text.startswith("failed  launcher (pid ") and "has not beaten for 5 min 0" in text


def test_where_there_is_no_run_or_no_sense(folder, tmp_path, monkeypatch, capsys):
    def code(path):
        monkeypatch.setattr("sys.argv", ["status", str(path)])
        with pytest.raises(SystemExit) as e:
            status.main()
        return e.value.code

    assert code(tmp_path) == 3 and "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["status/controller.json", "exits/launcher.json", "engines.json", "launcher.lock"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_named(folder, monkeypatch, capsys, name, left):
    with running(folder):
        pass  # nobody writes any more
    Reporter(folder, "launcher").ended("crash", "it failed")
    with locked(folder.lock):
        path = folder.path / name
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
        monkeypatch.setattr("sys.argv", ["status", str(folder.path)])
        with pytest.raises(SystemExit) as e:
            status.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert e.value.code == 3 and line.startswith("error: ") and str(path) in line
        folder.lock.unlink()


def test_the_last_line_of_the_starts_may_be_cut_off(folder):
    with running(folder):
        pass
    whole = folder.attempts.read_bytes()
    folder.attempts.write_bytes(whole + whole[:20])
    assert len(read_attempts(folder)) == 1
    with running(folder):
        assert len(read_attempts(folder)) == 2
    folder.attempts.write_bytes(whole + b'{"step": 2}\n')
    with pytest.raises(DataError, match=f"^{folder.attempts} has a line that is no start of a run .*: remove it$"):
        read_attempts(folder)


def test_the_newest_whole_checkpoint_counts(folder):
    for step, missing in ((3, False), (5, False), (10, True)):
        path = folder.checkpoint(step)
        path.mkdir(parents=True)
        files = {"controller.json": FileRecord(2, "0")}
        manifest = Manifest(format="weights", model={}, dtype="float32", step=step, files=files)
        (path / "manifest.json").write_bytes(encode_manifest(manifest))
        if not missing:
            (path / "controller.json").write_text("{}")
        os.utime(path / "manifest.json", (time.time() - 120,) * 2)
    _, text = shown(folder)
    assert "step 5, 2 min 0" in text and "step 10" not in text and "step 3" not in text


def test_whose_clock_counts():
    time_of, fresh = look.file_server_time, look.FRESH_S
    assert time_of([], 100.0) == 100.0
    assert time_of([90.0, 99.0], 100.0) == 100.0  # somebody lives, and the clocks agree
    assert time_of([90.0, 99.0 - fresh], 100.0) is None and time_of([101.0], 100.0) is None
    assert time_of([50.0, 40.0], 100.0, [51.0, 40.0]) == 51.0  # the file server is 49 s behind
    assert time_of([150.0], 100.0, [151.0]) == 151.0
    assert time_of([50.0], 103.0, [50.0]) == 103.0  # nobody lives
    assert time_of([150.0], 103.0, [150.0]) == 150.0
