"""What the nodes of a job answer when they are asked for its run folder, and what becomes of the job."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.run_folder import RunFolder
from launch import canary, slurm
from launch.allocation import Allocation, Group, Node, read_allocation
from launch.canary import Unfit, main, read_answers, unfit_nodes
from launch.states import Requeue
from tests.tiny import run_config
from tests.unit.launch.test_allocation import recorded

JOB = read_allocation(*recorded("plain"))
BLIND = ConfigError("run_dir=/x is not the same folder on every node (node2: Stale file handle): choose one that is")


def test_answers_are_found_among_what_else_is_printed():
    printed = "canary\tnode2\tsees it\nwarning: tab\there\nnot\ta\tcanary\n"
    printed += "canary\tnode1\tNo such file or directory: /x/.canary-1\ncanary\n"
    assert read_answers(printed) == {"node1": "No such file or directory: /x/.canary-1", "node2": "sees it"}


ALLOCATION = Allocation(7, 0, tuple(Group(7 + i, (Node(name, 4, 0),)) for i, name in enumerate("ab")), True, None)


@pytest.mark.parametrize(
    ("of_b", "kind", "says"),
    [
        ("sees it", None, None),
        ("silent", DapoError, r"no answer from b within .* \(srun: error: b: killed\): exclude them"),
        ("another folder", ConfigError, r"is not the same folder on every node \(b: sees another file there\)"),
        ("no folder", ConfigError, r"is not the same folder on every node \(b: No such file or directory: .*\)"),
        ("writes elsewhere", ConfigError, r"what b wrote into run_dir=.* is not seen here after 0 s"),
    ],
)
def test_every_node_reads_what_is_written_here_and_writes_what_is_read_here(
    tmp_path, monkeypatch, capsys, of_b, kind, says
):
    other = tmp_path / "other"
    other.mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    asked = []

    def ask(group, het_group, token: Path, environment):
        asked.append(het_group)
        (node,) = group.nodes
        if node.name == "b" and of_b == "silent":
            return subprocess.CompletedProcess([], 1, "", "srun: error: b: killed\n")
        at = token
        if node.name == "b" and of_b in ("another folder", "no folder"):
            at = other / token.name
            if of_b == "another folder":
                at.write_text("of somebody else")
        monkeypatch.setattr("sys.argv", ["canary", str(at)])
        monkeypatch.setenv("SLURMD_NODENAME", node.name)
        main()
        if of_b == "writes elsewhere":
            token.with_name(f"{token.name}.b").unlink(missing_ok=True)
        return subprocess.CompletedProcess([], 0, capsys.readouterr().out, "")

    monkeypatch.setattr(canary, "_ask", ask)
    monkeypatch.setattr(canary, "APPEAR_S", 0.0)
    found = unfit_nodes(ALLOCATION, folder, {})
    if kind is None:
        assert found is None
    else:
        assert found.nodes == ("b",) and type(found.error) is kind and re.search(says, str(found.error))
    assert asked == [0, 1] and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("restarts", "max_requeues", "comes_back"), [(0, 10, False), (1, 10, True), (1, 0, False), (3, 1, True)]
)
def test_only_a_job_that_ran_before_goes_back_without_them(tmp_path, monkeypatch, restarts, max_requeues, comes_back):
    """At its first start the folder may be a wrong one."""
    monkeypatch.setattr(slurm, "unfit_nodes", lambda *_: Unfit(("node2",), BLIND))
    folder, allocation = RunFolder(tmp_path), replace(JOB, restarts=restarts)
    config = run_config("nowhere", launch={"max_requeues": max_requeues})

    def start():
        return slurm._supervised(config, folder, None, allocation, None, (), ())

    if comes_back:
        assert start() == Requeue(str(BLIND), ("node2",), True)
        assert folder.journal.read_text().endswith("choose one that is -> back into the queue without node2\n")
    else:
        with pytest.raises(ConfigError, match="is not the same folder on every node"):
            start()
