"""The srun of a step."""

import pytest

from launch.allocation import Allocation, Group, Node
from launch.steps import step_command

GROUPS = (Group(7, (Node("a", 4, 8), Node("b", 4, 8))), Group(8, (Node("c", 4, 8),)))


@pytest.mark.parametrize(
    ("groups", "hosts", "group", "nodes"),
    [
        (GROUPS[:1], ["a"] * 8 + ["b"] * 8, None, 2),
        (GROUPS, ["b", "a"], 0, 2),
        (GROUPS, ["c"], 1, 1),
    ],
)
def test_a_task_for_each_host_in_its_group_with_the_whole_environment(groups, hosts, group, nodes):
    argv = step_command(Allocation(7, 0, groups, True, None), "trainer", hosts, "x-%t.log", ["python", "-m", "x"])
    assert argv[0] == "srun" and argv[-3:] == ["python", "-m", "x"]
    assert f"--nodes={nodes}" in argv and f"--ntasks={len(hosts)}" in argv
    assert [a for a in argv if a.startswith("--het-group")] == ([] if group is None else [f"--het-group={group}"])
    # A script with --export=NONE would leave its steps without the snapshot's PYTHONPATH.
    assert "--export=ALL" in argv
