"""Who failed, and who hangs: by exit codes, exit records and heartbeats."""

import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError, DataError, DapoError, EngineError, StorageError
from dapo_megatron.process import EXIT_CODES, Reporter, Status, read_exit, read_statuses, run_reported
from dapo_megatron.run_folder import RunFolder
from launch.failures import failed, failure, hang
from launch.heartbeats import Heartbeats
from launch.processes import Child


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path)
    folder.exits.mkdir()
    return folder


def child(folder, name, how):
    """A process that ended by `how`, a line of Python."""
    process = subprocess.Popen([sys.executable, "-c", f"import os, sys, signal; {how}"])
    process.wait()
    log = folder.path / f"{name}.log"
    log.write_text("first\nlast line\n")
    return Child(name, process, log, True, (name,))


def test_who_leaves_without_a_word_has_failed_whatever_the_exit_code(folder):
    gone = child(folder, "controller", "sys.exit(0)")
    assert failed(folder, [gone]) == [gone]
    assert "the controller ended with exit code 0" in str(failure(folder, [gone])[0])


def test_who_runs_has_not_failed_and_who_ends_well_says_so_with_both_code_and_record(folder):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    runs = Child("controller", process, folder.path / "controller.log", True, ("controller",))
    assert failed(folder, [runs]) == []
    process.kill()
    process.wait()
    for kind, code, has_failed in ((None, 0, False), (None, 1, True), ("data", 0, True)):
        leave_word(folder, "trainer-0", kind, "")
        ended = child(folder, "trainer-0", f"sys.exit({code})")
        assert failed(folder, [ended]) == ([ended] if has_failed else [])


def test_the_srun_of_a_step_ends_with_128_and_its_signal(folder):
    ended = child(folder, "trainer", "sys.exit(137)")
    of_several = replace(ended, processes=("trainer-0", "trainer-1"))
    assert "the trainer was killed by signal 9 (SIGKILL)" in str(failure(folder, [of_several])[0])
    assert "the trainer ended with exit code 137" in str(failure(folder, [ended])[0])


def test_a_full_disk_is_told_by_the_exit_code_where_no_record_fits(folder):
    error, _ = failure(folder, [child(folder, "trainer-0", f"sys.exit({EXIT_CODES['storage']})")])
    assert isinstance(error, StorageError) and "is full, read-only or gone" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("left", [0, 10, 60])
def test_a_record_that_was_cut_off_is_no_word(folder, left):
    leave_word(folder, "controller", None, "")
    whole = folder.exit("controller").read_bytes()
    folder.exit("controller").write_bytes(whole[:left])
    done = child(folder, "controller", "sys.exit(0)")
    assert failed(folder, [done]) == [done]
    assert "the controller ended with exit code 0" in str(failure(folder, [done])[0])
    folder.exit("controller").write_bytes(whole)  # another node saw to it that it is whole
    assert failed(folder, [done]) == []


@pytest.mark.parametrize("left", [0, 10, 60])
def test_a_status_that_was_cut_off_is_not_there_until_the_next_heartbeat(folder, left):
    with Reporter(folder, "trainer-0") as reporter, Reporter(folder, "trainer-1"):
        pass  # nobody beats any more
    path = folder.status("trainer-0")
    path.write_bytes(path.read_bytes()[:left])
    assert [status.process for status in read_statuses(folder)] == ["trainer-1"]
    reporter.phase("update")
    assert [status.process for status in read_statuses(folder)] == ["trainer-0", "trainer-1"]


def leave_word(folder, name, kind, message):
    Reporter(folder, name).ended(kind, message)
    time.sleep(0.01)


def test_who_was_killed_comes_before_those_who_complain(folder):
    leave_word(folder, "trainer-0", "crash", "RuntimeError: connection closed by peer")
    children = [child(folder, "trainer-0", "sys.exit(1)"), child(folder, "trainer-1", "os.kill(os.getpid(), 9)")]
    error, _ = failure(folder, children)
    assert "the trainer-1 was killed by signal 9 (SIGKILL)" in str(error) and "last line" in str(error)


def test_the_controllers_own_words_come_first_then_the_earliest(folder):
    leave_word(folder, "trainer-1", "crash", "second")
    leave_word(folder, "trainer-0", "engine", "first")
    leave_word(folder, "controller", "data", "no prompts")
    ranks = [child(folder, f"trainer-{i}", "sys.exit(1)") for i in range(2)]
    error, host = failure(folder, ranks)
    assert host == socket.gethostname()
    assert type(error) is DapoError and "the trainer-1 stopped: second" in str(error)
    error, _ = failure(folder, [*ranks, child(folder, "controller", "sys.exit(1)")])
    assert isinstance(error, DataError) and "the controller stopped: no prompts" in str(error)


def test_whose_fault_it_was_is_not_known_where_another_left_no_word(folder):
    """It may be the one of whose end the others complain; what is no crash has its own reason."""
    for kind, host in (("crash", None), ("engine", socket.gethostname())):
        leave_word(folder, "trainer-0", kind, "the other side is gone")
        error, found = failure(folder, [child(folder, f"trainer-{i}", "sys.exit(1)") for i in range(2)])
        assert "the trainer-0 stopped: the other side is gone" in str(error) and found == host


def test_an_engine_never_leaves_by_itself(folder):
    leave_word(folder, "controller", None, "")
    controller = child(folder, "controller", "sys.exit(0)")
    assert failed(folder, [controller]) == []
    error, _ = failure(folder, [child(folder, "engine-0", "sys.exit(0)"), controller])
    assert isinstance(error, EngineError) and "engine-0 ended with exit code 0" in str(error)


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("raise ConfigError('mend it')", "configuration", "mend it"),
        ("raise OSError(28, 'No space left on device', '/runs/x')", "storage", "No space left on device at /runs/x"),
        ("1 / 0", "crash", "ZeroDivisionError: division by zero"),
        ("raise RuntimeError('two\\nlines')", "crash", "RuntimeError: two"),
        ("pass", None, ""),
    ],
)
def test_every_end_leaves_a_record(folder, how, kind, says):
    code = run_reported(Reporter(folder, "trainer-3"), lambda: exec(how, {"ConfigError": ConfigError}))
    record = read_exit(folder, "trainer-3")
    assert (code, record.kind) == (0 if kind is None else EXIT_CODES[kind], kind)
    assert says in record.message and "\n" not in record.message


HANGING = """
import pathlib, sys, time
from dapo_megatron.process import Reporter, run_reported
from dapo_megatron.run_folder import RunFolder
def waits_for_ever():
    print("hangs", flush=True)
    time.sleep(60)
run_reported(Reporter(RunFolder(pathlib.Path(sys.argv[1])), "trainer-0"), waits_for_ever)
"""


def test_the_log_of_one_that_hangs_says_where(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(folder.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "hangs\n"
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and "in waits_for_ever" in log and "in _beat" in log


def test_a_process_beats_and_says_what_it_does(folder):
    with Reporter(folder, "trainer-0") as reporter:
        reporter.phase("update", "2/4")
        (before,) = read_statuses(folder)
        time.sleep(2.5)
        (after,) = read_statuses(folder)
    assert (before.phase, before.detail, after.since) == ("update", "2/4", before.since)
    assert after.beat >= before.beat + 2


def test_a_silent_process_is_named_with_its_phase():
    beats = Heartbeats(timeout_s=40)

    def status(name, beat):
        return Status(name, "node7", 4711, "push", "bucket 3", 0.0, beat)

    assert beats.silent([status("trainer-0", 1), status("trainer-1", 1)], 100.0) == []
    assert beats.silent([status("trainer-0", 2), status("trainer-1", 1)], 139.0) == []
    ((who, seconds),) = beats.silent([status("trainer-0", 3), status("trainer-1", 1)], 141.0)
    assert (who.process, seconds) == ("trainer-1", 41.0)
    assert "trainer-1 (pid 4711 on node7) hangs: no sign of life for 41 s, in phase push" in str(hang(who, seconds))


def test_a_restarted_process_is_not_the_silent_one():
    beats = Heartbeats(timeout_s=40)
    beats.silent([Status("controller", "h", 1, "idle", "", 0.0, 5)], 0.0)
    assert beats.silent([Status("controller", "h", 2, "idle", "", 0.0, 5)], 100.0) == []


def test_no_run_folder_no_statuses():
    assert read_statuses(RunFolder(Path("/nowhere/at/all"))) == []
