"""Which nodes a job that goes back into the queue must not get."""

import itertools

import pytest

from dapo_megatron.errors import DapoError
from launch.allocation import read_allocation
from launch.exclusions import (
    Request,
    affordable,
    by_user,
    excluded,
    failed_lately,
    fit_nodes,
    read_requests,
    remembered,
)
from tests.unit.launch.test_allocation import recorded

HOUR = 3600.0
NODES = {"main": {"a", "b", "c", "d"}}


def plain(*by_user, count=2, **more):
    return Request("7", count, "main", by_user, **more)


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


@pytest.mark.parametrize(
    ("lately", "request_", "up", "left"),
    [
        (["a", "b"], plain(), "abcd", ["a", "b"]),
        (["a", "b"], plain(count=3), "abcd", ["b"]),  # the oldest is given up
        (["a", "b"], plain(count=4), "abcd", []),
        (["a", "b"], plain("c"), "abcd", ["b"]),  # the user's exclusions take nodes too
        (["c"], plain("c", count=3), "abcd", ["c"]),
        (["a", "b"], plain(), "abd", ["b"]),
        (["c"], plain(), "abd", ["c"]),  # who is down takes none away
        (["c"], plain(count=4), "abd", []),  # but must not be excluded when it comes back
        (["a", "b"], plain(named=("a",)), "abcd", ["b"]),
    ],
)
def test_as_many_are_excluded_as_the_job_can_do_without(lately, request_, up, left):
    assert affordable(lately, [request_], {"main": set(up)}) == left


def test_groups_share_the_nodes_of_a_partition_or_have_their_own():
    two = [Request("7+0", 2, "main", ("d",)), Request("7+1", 1, "main", ())]
    assert affordable(["a"], two, NODES) == ["a"]
    assert affordable(["c"], [two[0], Request("7+1", 2, "main", ())], NODES) == []
    own = [two[0], Request("7+1", 1, "other", ())]
    assert affordable(["a", "x"], own, NODES | {"other": {"x", "y"}}) == ["a", "x"]
    assert affordable(["a", "x"], own, NODES | {"other": {"x"}}) == []


def test_what_is_excluded_always_leaves_enough():
    for count, size, by in itertools.product(range(1, 5), range(5), range(3)):
        request = plain(*"abcd"[:by], count=count)
        for lately in itertools.permutations("abcd", size):
            left = affordable(lately, [request], NODES)
            assert list(lately[len(lately) - len(left) :]) == left
            assert not left or len(NODES["main"] - {*excluded(request, left)}) >= count


def test_requests_are_read_of_every_group():
    environment, shown, expand = recorded("het_requeued")
    allocation = read_allocation(environment, shown, expand)
    assert read_requests(allocation, shown, expand) == [Request("7+0", 2, "main", ()), Request("7+1", 1, "main", ())]
    plain_ = recorded("plain")
    changed = plain_[1].replace("ReqNodeList=(null) ExcNodeList=(null)", "ReqNodeList=n5 ExcNodeList=n[3-4],n9")
    named = {"n5": ["n5"], "n[3-4],n9": ["n3", "n4", "n9"]}.__getitem__
    assert read_requests(read_allocation(*plain_), changed, named) == [
        Request("1", 3, "main", ("n3", "n4", "n9"), ("n5",))
    ]
    with pytest.raises(DapoError, match="scontrol does not show which nodes job 1 may get"):
        read_requests(read_allocation(*plain_), shown, expand)


def test_a_node_is_fit_if_it_can_get_a_job():
    states = {
        "idle": True,
        "mixed": True,
        "allocated": True,
        "completing": True,
        "planned": True,
        "reserved": True,
        "idle~": True,  # switched off until a job needs it
        "idle*": False,
        "down": False,
        "down*": False,
        "drained": False,
        "draining": False,
        "draining@": False,
        "fail": False,
        "failing": False,
        "error": False,
        "future": False,
        "inval": False,
        "unknown": False,
    }
    shown = "".join(f"{state}|{state}\n" for state in states)
    assert fit_nodes(shown) == {state for state, fit in states.items() if fit}
    assert fit_nodes("") == set()
