"""Which nodes a job that goes back into the queue must not get."""

import pytest

from dapo_megatron.errors import DapoError
from launch.allocation import read_allocation
from launch.exclusions import (
    Request,
    by_user,
    excluded,
    failed_lately,
    read_requests,
    remembered,
)
from tests.unit.launch.test_allocation import recorded

HOUR = 3600.0


def plain(*by_user):
    return Request("7", by_user)


def test_what_failed_lately_is_excluded_beside_what_the_user_excluded():
    bad = remembered({"node3": 0.0}, ["node5", "node4"], 5 * HOUR)
    assert bad == {"node3": 0.0, "node5": 5 * HOUR, "node4": 5 * HOUR}
    assert excluded(plain("node9"), failed_lately(bad, 5 * HOUR, 6 * HOUR)) == ("node9", "node3", "node5", "node4")


def test_a_node_is_forgotten():
    bad = {"node4": 4 * HOUR, "node3": 0.0}
    assert failed_lately(bad, 5.9 * HOUR, 6 * HOUR) == ["node3", "node4"]
    assert failed_lately(bad, 6 * HOUR, 6 * HOUR) == ["node4"]
    assert failed_lately(bad, 99 * HOUR, 6 * HOUR) == [] == failed_lately(bad, 4 * HOUR, 0)


def test_a_node_that_fails_again_is_remembered_from_then_on():
    assert failed_lately(remembered({"node3": 0.0}, ["node3"], 5 * HOUR), 10 * HOUR, 6 * HOUR) == ["node3"]


def test_what_the_user_excluded_stays_also_where_it_failed_in_an_earlier_job():
    before = plain("node9", "node3", "node4")
    assert by_user(before, ["node4"]) == plain("node9", "node3")
    assert excluded(by_user(before, ["node4"]), ["node3"]) == ("node9", "node3")
    assert excluded(by_user(before, ["node4"]), []) == ("node9", "node3")


def test_requests_are_read_of_every_group():
    environment, shown, expand = recorded("het_requeued")
    allocation = read_allocation(environment, shown, expand)
    assert read_requests(allocation, shown, expand) == [Request("7+0", ()), Request("7+1", ())]
    plain_ = recorded("plain")
    changed = plain_[1].replace("ExcNodeList=(null)", "ExcNodeList=n[3-4],n9")
    named = {"n[3-4],n9": ["n3", "n4", "n9"]}.__getitem__
    assert read_requests(read_allocation(*plain_), changed, named) == [Request("1", ("n3", "n4", "n9"))]
    with pytest.raises(DapoError, match="scontrol does not show which nodes job 1 may get"):
        read_requests(read_allocation(*plain_), shown, expand)
