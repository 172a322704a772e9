"""A checkpoint of spread experts, loaded where they are not spread, or the other way round.

megatron-core gives experts that are spread over ranks an optimizer of their own (megatron/core/optimizer/__init__.py).
The tensors of a fully_reshardable checkpoint have the same names either way; the settings of the parameter groups stand
by the optimizers that saved.
"""

from collections.abc import Sequence
from typing import Any

Group = dict[str, Any]

_SAME = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""What tells one group from another, besides `is_expert_parallel` (optimizer.py, param_group_identifier_keys)."""


def regrouped(loaded: dict[Any, Any], own: Sequence[Sequence[Group]]) -> dict[Any, Any]:
    """The optimizer's state as `load_state_dict` of this layout takes it.

    Args:
        loaded: the tensors by this layout's optimizers, everything else by the optimizers that saved; one optimizer's
            state stands in it, several under their numbers.
        own: [optimizer][group] parameter groups of this layout.

    Raises:
        ValueError: no saved group has the settings of one of ours.
    """
    numbers = sorted(key for key in loaded if isinstance(key, int))
    saved = [loaded] if "optimizer" in loaded else [loaded[n] for n in numbers if "optimizer" in loaded[n]]
    if len(saved) == len(own):
        return loaded
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    rest = {key: value for key, value in saved[0].items() if key not in (*numbers, "optimizer", "param_state")}
    parts = {
        i: rest
        | {
            "optimizer": {"param_groups": [_matching(groups, group) for group in own_groups]},
            "param_state": (loaded if len(own) == 1 else loaded[i])["param_state"],
        }
        for i, own_groups in enumerate(own)
    }
    return parts[0] if len(own) == 1 else parts


def _matching(saved: list[Group], own: Group) -> Group:
    """The saved settings of a group, among the experts where ours is."""
    for group in saved:
        if all(group[key] == own[key] for key in _SAME):
            return group | {"is_expert_parallel": own["is_expert_parallel"]}
    raise ValueError(f"no saved parameter group has { ({key: own[key] for key in _SAME}) }")
