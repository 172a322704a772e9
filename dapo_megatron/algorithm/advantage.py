"""Group-relative advantage (DAPO, arXiv 2503.14476, equation 9)."""

from torch import Tensor

STD_FLOOR = 1e-6
"""Added to the standard deviation, as in verl's `compute_grpo_outcome_advantage`."""


def group_advantages(rewards: Tensor) -> Tensor:
    """Advantage of each response of one prompt: (R_i - mean) / (std + 1e-6), with the unbiased std.

    Args:
        rewards: [G], floating point, the (shaped) rewards of the G responses of one prompt.

    Returns:
        [G], the dtype of `rewards`; every token of response i gets the advantage A_i.

    Raises:
        ValueError: unless `rewards` is one-dimensional with G >= 2 (one response has no baseline).
    """
    if rewards.dim() != 1 or rewards.numel() < 2:
        raise ValueError(f"a group is a vector of at least 2 rewards, got shape {list(rewards.shape)}")
    # float64: in float32 the rounding of the mean of equal rewards is not small against the floor of 1e-6.
    exact = rewards.double()
    return ((exact - exact.mean()) / (exact.std(unbiased=True) + STD_FLOOR)).to(rewards.dtype)
