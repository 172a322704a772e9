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
    reserved_nodes,
)
from tests.unit.launch.test_allocation import recorded

HOUR = 3600.0
NODES = {job: {"a", "b", "c", "d"} for job in ("7", "7+0", "7+1")}


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
    assert affordable(lately, [request_], {"7": set(up)}) == left


def test_groups_share_the_nodes_of_a_partition_or_have_their_own():
    two = [Request("7+0", 2, "main", ("d",)), Request("7+1", 1, "main", ())]
    assert affordable(["a"], two, NODES) == ["a"]
    assert affordable(["c"], [two[0], Request("7+1", 2, "main", ())], NODES) == []
    own = [two[0], Request("7+1", 1, "other", ())]
    assert affordable(["a", "x"], own, NODES | {"7+1": {"x", "y"}}) == ["a", "x"]
    assert affordable(["a", "x"], own, NODES | {"7+1": {"x"}}) == []


def test_what_is_excluded_always_leaves_enough():
    for count, size, by in itertools.product(range(1, 5), range(5), range(3)):
        request = plain(*"abcd"[:by], count=count)
        for lately in itertools.permutations("abcd", size):
            left = affordable(lately, [request], NODES)
            assert list(lately[len(lately) - len(left) :]) == left
            assert not left or len(NODES["7"] - {*excluded(request, left)}) >= count


def test_requests_are_read_of_every_group():
    environment, shown, expand = recorded("het_requeued")
    allocation = read_allocation(environment, shown, expand)
    assert read_requests(allocation, shown, expand) == [
        Request("7+0", 2, "main", (), has=("node1", "node2"), gpus=True),
        Request("7+1", 1, "main", (), has=("node3",)),
    ]
    plain_ = recorded("plain")
    changed = plain_[1].replace("ReqNodeList=(null) ExcNodeList=(null)", "ReqNodeList=n5 ExcNodeList=n[3-4],n9")
    changed = changed.replace("Features=(null)", "Features=h100&ib").replace("   Power=", "   Reservation=ours\n ")
    named = {"n5": ["n5"], "n[3-4],n9": ["n3", "n4", "n9"]}.__getitem__
    assert read_requests(read_allocation(*plain_), changed, named) == [
        Request("1", 3, "main", ("n3", "n4", "n9"), ("n5",), ("node1", "node2", "node3"), True, "h100&ib", "ours")
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
    shown = "".join(f"{state}|{state}|(null)|(null)\n" for state in states)
    assert fit_nodes(shown, plain()) == {state for state, fit in states.items() if fit}
    assert fit_nodes("", plain()) == set()


SHOWN = """\
a|allocated|h100,ib,rack1|gpu:h100:8(S:0-1),shard:64
b|allocated|h100,ib,rack2|gpu:h100:8(S:0,2),shard:32
c|idle|h100,rack2|gpu:h100:8
d|idle|a100,ib,rack1|gpu:a100:8
e|idle|h100,ib,rack1|gpu:h100:4
f|idle|ib|(null)
"""


@pytest.mark.parametrize(
    ("gpus", "features", "reserved", "fit"),
    [
        (False, None, None, "abcdef"),
        (True, None, None, "abc"),
        (False, "ib", None, "abdef"),
        (False, "h100&ib", None, "abe"),
        (True, "rack2&h100", None, "bc"),
        (False, "[rack1|rack2]", None, "abe"),  # a choice: nodes like a or b
        (True, None, "bcf", "bc"),
        (False, None, "", ""),
    ],
)
def test_only_what_could_take_the_place_of_the_jobs_nodes_counts(gpus, features, reserved, fit):
    request = plain(has=("a", "b"), gpus=gpus, features=features)
    assert fit_nodes(SHOWN, request, None if reserved is None else list(reserved)) == set(fit)


def test_the_nodes_of_a_reservation():
    shown = "ReservationName=ours StartTime=1 EndTime=2\n   Nodes=n[1-2] NodeCnt=2 Features=(null)\n   TRES=cpu=4\n"
    assert reserved_nodes(shown, {"n[1-2]": ["n1", "n2"]}.__getitem__) == ["n1", "n2"]
    with pytest.raises(DapoError, match="scontrol shows no nodes of the job's reservation: ReservationName=ours"):
        reserved_nodes(shown.replace("n[1-2]", "(null)"), str.split)
