"""Which nodes a job that goes back into the queue must not get."""

from launch.requeue import excluded, remembered

HOUR = 3600.0


def test_what_failed_lately_is_excluded_beside_what_the_user_excluded():
    bad = remembered({"node3": 0.0}, ["node5", "node4"], 5 * HOUR)
    assert bad == {"node3": 0.0, "node5": 5 * HOUR, "node4": 5 * HOUR}
    assert excluded(["node9"], bad, 5 * HOUR, 6 * HOUR) == ["node9", "node3", "node5", "node4"]


def test_a_node_is_forgotten_but_not_what_the_user_excluded():
    bad = {"node3": 0.0, "node4": 4 * HOUR}
    before = ["node9", "node3", "node4"]
    assert excluded(before, bad, 5.9 * HOUR, 6 * HOUR) == before
    assert excluded(before, bad, 6 * HOUR, 6 * HOUR) == ["node9", "node4"]
    assert excluded(before, bad, 99 * HOUR, 6 * HOUR) == ["node9"]
    assert excluded(["node3"], bad, 5 * HOUR, 0) == []


def test_a_node_that_fails_again_is_remembered_from_then_on():
    bad = remembered({"node3": 0.0}, ["node3"], 5 * HOUR)
    assert excluded(["node3"], bad, 10 * HOUR, 6 * HOUR) == ["node3"]
