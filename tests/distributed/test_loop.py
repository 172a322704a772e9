"""What the training loop makes of a step's mini-batches: old log-probs before, one record after."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.distributed.test_actor import replica_batch
from tests.tiny import groups, hf_folder, run_config


from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.actor.training_objective import PolicyObjective
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import CheckpointConfig
from dapo_megatron.observe.catalog import reduce_updates
from dapo_megatron.trainer.loop import format_of, old_logprobs, train_step
from dapo_megatron.trainer.replica_batch import ReplicaBatch
from dapo_megatron.weights.exporter import export_stage


def old_and_expected(config):
    actor = actor_on_rank(config)
    batch = replica_batch(config, 1000, actor.layout)
    shards = [batch[0], batch[1]]
    rollout = config.algorithm.old_logprobs == "rollout"
    expected = [
        [actor.own_column(m, m.rollout_logprobs) for m in shard] if rollout else actor.logprobs(shard)
        for shard in shards
    ]
    found = old_logprobs(config, actor, batch)
    one = old_logprobs(config, actor, ReplicaBatch(1, 0, 1, batch.shard, packing_rules(config)))
    same = [o is not None and all(map(torch.equal, o, e)) for o, e in zip(found, expected, strict=True)]
    return [o is None for o in found], same, [o is None for o in one]


@pytest.mark.parametrize(
    ("kind", "own", "same", "one"),
    [("actor", [True, False], [False, True], [True]), ("rollout", [False, False], [True, True], [False])],
)
def test_only_the_first_update_takes_its_own_log_probs(tmp_path, kind, own, same, one):
    config = run_config(hf_folder(tmp_path), algorithm={"old_logprobs": kind})
    assert run_ranks(1, old_and_expected, config) == [(own, same, one)]


def sequences_trained(config):
    """What this rank was given to train in one rollout step, the step's metrics, and the weights after it.

    Only the actor is real: the controller hands out a batch, and there is no engine to push to.
    """
    actor, given = actor_on_rank(config), []
    update = actor.update

    def noted(shard, objective, old):
        given.append([sequence for micro_batch in shard for sequence in micro_batch.sequences])
        return update(shard, objective, old)

    actor.update = noted
    state, metrics = train_step(
        config,
        actor,
        SimpleNamespace(push=lambda version: {"sync/bytes": float(version)}),
        SimpleNamespace(verify=lambda version: {"sync/logprob_difference": version / 8}),
        SimpleNamespace(phase=lambda name: nullcontext()),
        PolicyObjective(config.algorithm),
        TrainState(),
        replica_batch(config, 24, actor.layout),
    )
    assert (state.step, state.version) == (1, 1)
    assert (metrics["sync/bytes"], metrics["sync/logprob_difference"]) == (1.0, 0.125)
    return given, metrics, {name: tensor.numpy().copy() for name, tensor in export_stage(actor.modules, actor.shape)}


def test_every_sequence_is_trained_once_over_the_data_parallel_ranks(tmp_path):
    path = hf_folder(tmp_path)
    two = run_ranks(2, sequences_trained, run_config(path, actor={"data_parallel_size": 2}))
    every = {(group.prompt.id, response.sample) for group in groups() for response in group.responses}
    assert len(every) == 16
    trained = [sequence for given, _, _ in two for update in given for sequence in update]
    assert len(trained) == 16 and set(trained) == every
    assert all(len(given) == 2 and all(given) for given, _, _ in two)

    ((_, metrics, weights),) = run_ranks(1, sequences_trained, run_config(path))
    assert two[0][1] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    for name, tensor in two[0][2].items():
        np.testing.assert_allclose(tensor, weights[name], atol=2e-6, err_msg=name)


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


def test_every_nth_checkpoint_and_the_last_can_be_resumed_in_any_layout():
    config = CheckpointConfig(every=2, reshardable_every=3)
    full = [s for s in range(1, 15) if format_of(s, config, is_wanted=s == 13) == "fully_reshardable"]
    assert full == [6, 12, 13]
    assert format_of(4, config, is_wanted=False) == "dp_reshardable"
    assert format_of(3, CheckpointConfig(every=3, reshardable_every=1), is_wanted=False) == "fully_reshardable"
