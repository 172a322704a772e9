"""A real SLURM cluster for tests, or the reason why there is none."""

import pytest

from tests.slurm.cluster import Cluster, obstacle

NODES = 4


@pytest.fixture(scope="module")
def nodes_up(request):
    """A cluster of 4 nodes; of another number with @pytest.mark.parametrize("nodes_up", [2], indirect=True)."""
    if reason := obstacle():
        pytest.skip(reason)
    with Cluster(getattr(request, "param", NODES)) as cluster:
        yield cluster


@pytest.fixture
def cluster(nodes_up):
    """The module's cluster, with all nodes up and nothing running; a test that leaves a process on a node fails."""
    yield nodes_up
    nodes_up.tidy()
