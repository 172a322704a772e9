"""What the nodes answer, as srun prints it."""

from launch.canary import read_answers


def test_answers_are_found_among_what_else_is_printed():
    printed = (
        "canary\tnode2\tsees it\nwarning: tab\there\ncanary\tnode1\tNo such file or directory: /x/.canary-1\ncanary\n"
    )
    assert read_answers(printed) == {"node1": "No such file or directory: /x/.canary-1", "node2": "sees it"}
