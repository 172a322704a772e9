"""What the nodes of a job answer when they are asked for its run folder, and what is made of it."""

import subprocess
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError, DapoError
from launch import canary
from launch.allocation import Allocation, Group, Node
from launch.canary import check_nodes, main, read_answers


def test_answers_are_found_among_what_else_is_printed():
    printed = "canary\tnode2\tsees it\nwarning: tab\there\nnot\ta\tcanary\n"
    printed += "canary\tnode1\tNo such file or directory: /x/.canary-1\ncanary\n"
    assert read_answers(printed) == {"node1": "No such file or directory: /x/.canary-1", "node2": "sees it"}


ALLOCATION = Allocation(7, 0, tuple(Group(7 + i, (Node(name, 4, 0),)) for i, name in enumerate("ab")), True, None)


@pytest.mark.parametrize(
    ("of_b", "error", "says"),
    [
        ("sees it", None, None),
        ("silent", DapoError, r"no answer from b within .* \(srun: error: b: killed\): exclude them"),
        ("another folder", ConfigError, r"is not the same folder on every node \(b: sees another file there\)"),
        ("no folder", ConfigError, r"is not the same folder on every node \(b: No such file or directory: .*\)"),
        ("writes elsewhere", ConfigError, r"what b wrote into run_dir=.* is not seen here after 0 s"),
    ],
)
def test_every_node_reads_what_is_written_here_and_writes_what_is_read_here(
    tmp_path, monkeypatch, capsys, of_b, error, says
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
    if error is None:
        check_nodes(ALLOCATION, folder, {})
    else:
        with pytest.raises(error, match=says):
            check_nodes(ALLOCATION, folder, {})
    assert asked == [0, 1] and list(folder.iterdir()) == []
