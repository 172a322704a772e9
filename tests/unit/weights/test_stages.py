"""Which parameters one collective gathers."""

import pytest

from dapo_megatron.weights.stages import gathered_together

PARAMETERS = [("a", 0, 40), ("b", 0, 60), ("c", 0, 1), ("d", 1, 10), ("e", 1, 10), ("f", 0, 500), ("g", 0, 5)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, ["a", "b", "c", "d", "e", "f", "g"]),
        (100, ["ab", "c", "de", "f", "g"]),
        (101, ["abc", "de", "f", "g"]),
        (10_000, ["abc", "de", "fg"]),
    ],
)
def test_neighbours_of_one_kind_up_to_a_size(most, expected):
    assert ["".join(together) for together in gathered_together(PARAMETERS, most)] == expected


def test_nothing_is_gathered_of_nothing():
    assert list(gathered_together([], 10)) == []
