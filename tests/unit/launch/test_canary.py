"""What the nodes answer, as srun prints it, and what becomes of a job some of whose nodes do not see its folder."""

from dataclasses import replace
from subprocess import CompletedProcess

import pytest

from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.run_folder import RunFolder
from launch import canary, slurm
from launch.allocation import read_allocation
from launch.canary import Unfit, read_answers, unfit_nodes
from launch.states import Requeue
from tests.tiny import run_config
from tests.unit.launch.test_allocation import recorded

JOB = read_allocation(*recorded("plain"))
BLIND = ConfigError("run_dir=/x is not the same folder on every node (node2: Stale file handle): choose one that is")


def test_answers_are_found_among_what_else_is_printed():
    printed = (
        "canary\tnode2\tsees it\nwarning: tab\there\ncanary\tnode1\tNo such file or directory: /x/.canary-1\ncanary\n"
    )
    assert read_answers(printed) == {"node1": "No such file or directory: /x/.canary-1", "node2": "sees it"}


@pytest.mark.parametrize(
    ("answers", "written", "nodes", "kind", "says"),
    [
        ({"node1": "sees it", "node2": "sees it", "node3": "sees it"}, "123", (), None, ""),
        ({"node1": "sees it", "node3": "sees it"}, "13", ("node2",), DapoError, "no answer from node2 within 120 s"),
        (
            {"node1": "sees it", "node2": "Stale file handle", "node3": "sees it"},
            "13",
            ("node2",),
            ConfigError,
            "is not the same folder on every node (node2: Stale file handle)",
        ),
        ({f"node{i}": "sees it" for i in (1, 2, 3)}, "2", ("node1", "node3"), ConfigError, "what node1, node3 wrote"),
    ],
)
def test_nodes_that_do_not_see_the_folder_are_named(tmp_path, monkeypatch, answers, written, nodes, kind, says):
    def ask(group, het_group, token, environment):
        for i in written:
            token.with_name(f"{token.name}.node{i}").touch()
        return CompletedProcess([], 0, "".join(f"canary\t{n}\t{a}\n" for n, a in answers.items()), "")

    monkeypatch.setattr(canary, "_ask", ask)
    monkeypatch.setattr(canary, "APPEAR_S", 0.0)
    found = unfit_nodes(JOB, tmp_path, {})
    assert (found.nodes if found else ()) == nodes and list(tmp_path.iterdir()) == []
    assert found is None or (type(found.error) is kind and says in str(found.error))


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
