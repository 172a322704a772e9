"""Where a launcher's deputy runs."""

from launch.deputy import next_host

HOSTS = ["node1", "node2", "node3"]


def test_it_is_on_the_first_other_node_that_is_there():
    assert next_host(HOSTS, set()) == "node2"
    assert next_host(HOSTS, {"node2"}) == "node3"
    assert next_host(HOSTS, {"node2", "node3"}) is None
    assert next_host(HOSTS[:1], set()) is None
