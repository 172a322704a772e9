"""Settings of the optimizer's parameter groups, when experts begin or end to be spread."""

import pytest

from dapo_megatron.checkpoint.regrouping import regrouped


def group(decay, experts=False, **saved):
    return {"wd_mult": decay, "lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": experts, **saved}


DENSE = [group(1.0), group(0.0)]
EXPERTS = [group(1.0, experts=True)]


def state(*groups):
    return {"optimizer": {"param_groups": list(groups)}, "param_state_sharding_type": "fully_reshardable"}


def test_one_optimizer_becomes_two():
    saved = state(group(0.0, step=3, weight_decay=0.0), group(1.0, step=3, weight_decay=0.1))
    found = regrouped(saved | {0: {"param_state": "dense"}, 1: {"param_state": "experts"}}, [DENSE, EXPERTS])
    dense = state(group(1.0, step=3, weight_decay=0.1), group(0.0, step=3, weight_decay=0.0))
    experts = state(group(1.0, experts=True, step=3, weight_decay=0.1))
    assert found == {0: dense | {"param_state": "dense"}, 1: experts | {"param_state": "experts"}}


def test_two_optimizers_become_one():
    loaded = {0: state(group(1.0, step=5, weight_decay=0.1), group(0.0, step=5)), 1: state(EXPERTS[0] | {"step": 5})}
    found = regrouped(loaded | {"param_state": "all"}, [DENSE])
    assert found == state(group(1.0, step=5, weight_decay=0.1), group(0.0, step=5)) | {"param_state": "all"}


def test_as_many_stay_as_they_are():
    one = state(*DENSE) | {"param_state": "all"}
    two = {0: one, 1: state(*EXPERTS) | {"param_state": "experts"}}
    assert regrouped(one, [DENSE]) is one
    assert regrouped(two, [DENSE, EXPERTS]) is two


def test_a_group_that_was_not_saved_is_an_error():
    loaded = {0: state(group(1.0)), 1: state(*EXPERTS), "param_state": "all"}
    with pytest.raises(ValueError, match=r"no saved parameter group has \{'wd_mult': 0\.0"):
        regrouped(loaded, [DENSE])
    for other in ({"lr_mult": 10.0}, {"is_decoupled_lr": True}):
        with pytest.raises(ValueError, match="no saved parameter group has"):
            regrouped(loaded, [[group(1.0, **other)]])
