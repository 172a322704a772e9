"""R_acc: +1 for right, -1 for everything else."""

import pytest

from dapo_megatron.algorithm.reward import accuracy_reward


@pytest.mark.parametrize("verdict, reward", [("right", 1.0), ("wrong", -1.0), ("unknown", -1.0)])
def test_accuracy_reward(verdict, reward):
    assert accuracy_reward(verdict) == reward
