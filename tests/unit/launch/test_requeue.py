"""What SLURM is told of a job that goes back into the queue, by commands that only write down what they are told."""

import os
import re
import signal
import time
from dataclasses import replace

import pytest

from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.errors import DapoError, Preempted
from dapo_megatron.run_folder import RunFolder
from launch import requeue as module
from launch.allocation import read_allocation
from launch.exclusions import Request
from launch.requeue import count_failure, failures, remember, requeue
from launch.slurm import _limits
from launch.states import Requeue
from tests.unit.launch.test_allocation import recorded

SCRIPT = """#!/bin/bash
case "$*" in
  "show job"*) cat {folder}/shown ;;
  "show hostnames"*) echo "${{@: -1}}" | tr , "\\n" ;;
  "show reservation"*) printf "ReservationName=ours StartTime=1\\n   Nodes=node1,node2,node3 NodeCnt=3\\n" ;;
  --noheader*) {sinfo} sed "s/$/|(null)|gpu:2/" {folder}/nodes ;;
  update*) {update} echo "$*" >>{folder}/told ;;
  *) echo "$*" >>{folder}/told; kill $PPID ;;
esac
"""


def told(
    monkeypatch,
    folder,
    name,
    by_users,
    bad,
    state="idle",
    sinfo="",
    is_failure=True,
    update="",
    waits_s=0.0,
    reservation="(null)",
):
    """What SLURM is told, without the requeue itself, of a recorded job whose groups' users excluded nodes."""
    environment, shown, expand = recorded(name)
    users = iter(by_users)
    shown = re.sub(r"(?<=ExcNodeList=)\(null\)", lambda _: next(users), shown)
    (folder / "shown").write_text(shown.replace("   Power=", f"   Reservation={reservation}\n   Power="))
    (folder / "nodes").write_text(f"node1|idle\nnode2|idle\nnode3|mixed\nnode4|{state}\n")
    for command in ("scontrol", "sinfo"):
        (folder / command).write_text(SCRIPT.format(folder=folder, sinfo=sinfo, update=update))
        (folder / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "REQUEUED_S", waits_s)
    monkeypatch.setattr("launch.slurm_calls.PAUSE_S", 0.0)
    (folder / "told").unlink(missing_ok=True)
    run = RunFolder(folder)
    allocation = read_allocation(environment, shown, expand)
    run.snapshot(allocation.job_id).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DapoError, match=f"has put job {allocation.job_id} back, and has not ended it"):
        requeue(allocation, run, Requeue("it failed", bad, is_failure), 3600.0)
    lines = (folder / "told").read_text().splitlines()
    assert lines[0] == f"requeue {allocation.job_id}"
    return lines[1:]


@pytest.fixture(autouse=True)
def sigterm_as_before():
    """A requeue ignores it from then on: SLURM sends it at once, and nodes are still to be excluded."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SLURM has ended the launcher"))
    yield
    signal.signal(signal.SIGTERM, before)


def test_bad_nodes_join_what_the_user_excluded(monkeypatch, tmp_path):
    assert told(monkeypatch, tmp_path, "requeued", ["node4"], ("node3",)) == ["update JobId=6 ExcNodeList=node4,node3"]


def test_nodes_are_excluded_as_soon_as_the_job_waits_and_slurm_has_its_time_to_end_the_launcher(monkeypatch, tmp_path):
    busy, began = f"[ -e {tmp_path}/waits ] || {{ touch {tmp_path}/waits; exit 1; }};", time.monotonic()
    bad = told(monkeypatch, tmp_path, "requeued", ["(null)"], ("node3",), update=busy, waits_s=1.5)
    assert bad == ["update JobId=6 ExcNodeList=node3"] and time.monotonic() > began + 1.5


def test_each_group_keeps_what_its_user_excluded(monkeypatch, tmp_path):
    # JobId=7 would stand for both groups.
    assert told(monkeypatch, tmp_path, "het_requeued", ["node4", "node2"], ()) == []
    assert told(monkeypatch, tmp_path, "het_requeued", ["(null)", "node2"], ("node2",)) == [
        "update JobId=7+0 ExcNodeList=node2"
    ]


def test_what_the_user_excluded_stays_when_the_failures_there_are_forgotten(monkeypatch, tmp_path):
    remember(RunFolder(tmp_path), ["node3"])  # in an earlier job
    assert told(monkeypatch, tmp_path, "requeued", ["node3"], ("node4",)) == ["update JobId=6 ExcNodeList=node3,node4"]
    long_ago = time.time() - 3601
    RunFolder(tmp_path).bad_nodes.write_text(f'{{"node3":{long_ago},"node4":{long_ago}}}')
    assert told(monkeypatch, tmp_path, "requeued", ["node3,node4"], ()) == ["update JobId=6 ExcNodeList=node3"]


def test_where_too_few_nodes_would_be_left_none_is_excluded(monkeypatch, tmp_path):
    assert told(monkeypatch, tmp_path, "requeued", ["(null)"], ("node3",), state="drained") == [
        "update JobId=6 ExcNodeList=node3"
    ]
    assert told(monkeypatch, tmp_path, "requeued", ["node3"], ("node2",), state="down*") == [
        "update JobId=6 ExcNodeList=node2"
    ]
    (line,) = RunFolder(tmp_path).journal.read_text().splitlines()
    assert line.partition(" ")[2] == "node3 failed, and not excluded: too few nodes would be left for the job"


def test_what_a_reservation_lacks_is_not_excluded(monkeypatch, tmp_path):
    """The partition has node4 too, which the job cannot get: SLURM would hold it for ever."""
    bad = ("node2", "node3")
    found = [told(monkeypatch, tmp_path, "requeued", ["(null)"], bad, reservation=name) for name in ("(null)", "ours")]
    assert found == [["update JobId=6 ExcNodeList=node2,node3"], ["update JobId=6 ExcNodeList=node3"]]


def test_groups_of_two_partitions_each_need_nodes_of_their_own(monkeypatch, tmp_path):
    nodes = {
        "main": "a|idle|(null)|(null)\nb|idle|(null)|(null)\n",
        "gpu": "c|idle|(null)|(null)\nd|down|(null)|(null)\n",
    }
    monkeypatch.setattr(module, "_nodes_of", nodes.__getitem__)
    requests = [Request("7+0", 1, "main", ()), Request("7+1", 1, "gpu", ())]
    assert module._affordable(RunFolder(tmp_path), ["c", "a"], requests) == ["a"]


def test_where_sinfo_fails_the_job_comes_back_on_any_nodes(monkeypatch, tmp_path):
    assert told(monkeypatch, tmp_path, "requeued", ["node4"], ("node3",), sinfo="echo no >&2; exit 1;") == []
    (line,) = RunFolder(tmp_path).journal.read_text().splitlines()
    assert "node3 failed, and not excluded: `sinfo " in line and line.endswith("` failed: no")


@pytest.mark.parametrize("text", ["", '{"node1":', "[]"])
def test_a_damaged_list_of_bad_nodes_stops_no_requeue(monkeypatch, tmp_path, text):
    RunFolder(tmp_path).bad_nodes.write_text(text)
    assert told(monkeypatch, tmp_path, "requeued", ["(null)"], ("node3",)) == ["update JobId=6 ExcNodeList=node3"]
    (line,) = RunFolder(tmp_path).journal.read_text().splitlines()
    assert f"{RunFolder(tmp_path).bad_nodes} cannot be read (" in line


def test_failures_are_counted_for_each_job_and_time_limits_are_not(monkeypatch, tmp_path):
    folder = RunFolder(tmp_path)
    assert failures(folder, 6) == 0
    for is_failure, count in ((True, 1), (False, 1), (True, 2)):
        told(monkeypatch, tmp_path, "requeued", ["(null)"], (), is_failure=is_failure)
        assert failures(folder, 6) == count
    told(monkeypatch, tmp_path, "requeued", ["(null)"], ("node3",))
    count_failure(folder, 6)  # the launcher's deputy
    assert failures(folder, 6) == 4 and failures(folder, 7) == 0
    # What the job had excluded itself is still known.
    assert told(monkeypatch, tmp_path, "requeued", ["node4,node3"], (), sinfo="exit 1;") == [
        "update JobId=6 ExcNodeList=node4"
    ]


@pytest.mark.parametrize(
    ("limit", "failed", "limits"),
    [(2, 0, (True, True)), (2, 1, (True, True)), (2, 2, (True, False)), (0, 0, (False, False))],
)
def test_max_requeues_is_of_failures(tmp_path, limit, failed, limits):
    folder, allocation = RunFolder(tmp_path), read_allocation(*recorded("requeued"))
    folder.snapshot(allocation.job_id).mkdir(parents=True)
    for _ in range(failed):
        count_failure(folder, allocation.job_id)
    launch = LaunchConfig(max_requeues=limit)
    found = _limits(launch, allocation, folder)
    said = folder.journal.read_text() if folder.journal.exists() else ""
    assert (found.can_requeue, found.can_fail) == limits
    assert ("launch.max_requeues=2 is used up: another failure ends the job" in said) == (limits == (True, False))
    assert not _limits(launch, replace(allocation, can_requeue=False), folder).can_requeue
    assert folder.journal.exists() == (limit > 0)
    assert limit == 0 or folder.journal.read_text().endswith("--no-requeue was given, or is the cluster's default\n")


@pytest.mark.parametrize(("reason", "error"), [("None", Preempted), ("TimeLimit", DapoError)])
def test_a_job_that_is_cancelled_while_it_ends_is_not_put_back(monkeypatch, tmp_path, reason, error):
    told(monkeypatch, tmp_path, "requeued", ["(null)"], ())
    (tmp_path / "told").unlink()
    shown = (tmp_path / "shown").read_text()
    (tmp_path / "shown").write_text(
        shown.replace("JobState=RUNNING Reason=None", f"JobState=COMPLETING Reason={reason}")
    )
    with pytest.raises(DapoError) as e:
        requeue(read_allocation(*recorded("requeued")), RunFolder(tmp_path), Requeue("it failed", (), True), 3600.0)
    assert type(e.value) is error and (tmp_path / "told").exists() == (error is DapoError)
