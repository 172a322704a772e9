"""What the training loop makes of a step's mini-batches: old log-probs before, one record after."""

import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import step_batch
from tests.tiny import hf_folder, run_config

from dapo_megatron.observe.catalog import reduce_updates
from dapo_megatron.trainer.loop import old_logprobs


def old_and_expected(config):
    actor = actor_on_rank(config)
    shards = [m.shards[0] for m in step_batch(config, 1000).mini_batches]
    rollout = config.algorithm.old_logprobs == "rollout"
    expected = [
        [actor.own_column(m, m.rollout_logprobs) for m in shard] if rollout else actor.logprobs(shard)
        for shard in shards
    ]
    found = old_logprobs(config, actor, shards)
    one = old_logprobs(config, actor, shards[:1])
    same = [o is not None and all(map(torch.equal, o, e)) for o, e in zip(found, expected, strict=True)]
    return [o is None for o in found], same, [o is None for o in one]


@pytest.mark.parametrize(
    ("kind", "own", "same", "one"),
    [("actor", [True, False], [False, True], [True]), ("rollout", [False, False], [True, True], [False])],
)
def test_only_the_first_update_takes_its_own_log_probs(tmp_path, kind, own, same, one):
    config = run_config(hf_folder(tmp_path), algorithm={"old_logprobs": kind})
    assert run_ranks(1, old_and_expected, config) == [(own, same, one)]


def test_updates_become_one_record():
    def update(loss, far, norm, lr, skipped):
        return {
            "policy/loss": loss,
            "mismatch/abs_max": far,
            "optimizer/grad_norm": norm,
            "optimizer/grad_norm_min": norm,
            "optimizer/lr": lr,
            "optimizer/skipped": skipped,
        }

    assert reduce_updates([update(1.0, 0.5, 2.0, 0.1, 1.0), update(3.0, 0.25, 1.0, 0.2, 0.0)]) == {
        "policy/loss": 2.0,
        "mismatch/abs_max": 0.5,
        "optimizer/grad_norm": 1.5,
        "optimizer/grad_norm_min": 1.0,
        "optimizer/lr": 0.2,
        "optimizer/skipped": 1.0,
    }
