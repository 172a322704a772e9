"""Where a launcher's deputy runs, and what it may put back."""

import pytest

from launch.deputy import is_running, next_host

HOSTS = ["node1", "node2", "node3"]


def test_it_is_on_the_first_other_node_that_is_there():
    assert next_host(HOSTS, set()) == "node2"
    assert next_host(HOSTS, {"node2"}) == "node3"
    assert next_host(HOSTS, {"node2", "node3"}) is None
    assert next_host(HOSTS[:1], set()) is None


@pytest.mark.parametrize(
    ("shown", "restarts", "runs"),
    [
        ("JobId=7 JobName=dapo JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1", 0, True),
        ("JobId=7 JobName=dapo JobState=RUNNING Reason=None Requeue=1 Restarts=1 BatchFlag=1", 0, False),
        ("JobId=7 JobName=dapo JobState=RUNNING Reason=None Requeue=1 Restarts=10 BatchFlag=1", 1, False),
        ("JobId=7 JobName=dapo JobState=COMPLETED Reason=None Requeue=1 Restarts=0 BatchFlag=1", 0, False),
        ("JobId=7 JobName=dapo JobState=PENDING Reason=BeginTime Requeue=1 Restarts=1 BatchFlag=1", 1, False),
        ("", 0, False),
    ],
)
def test_only_its_own_attempt_is_put_back(shown, restarts, runs):
    assert is_running(shown, restarts) == runs
