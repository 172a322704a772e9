"""Which evaluations are waited for, which go on beside training, and where each is told."""

from contextlib import contextmanager

import pytest

from tests.distributed.harness import run_ranks  # noqa: F401  # first: patches megatron-core on machines without CUDA
from tests.tiny import run_config

from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.trainer.evaluations import Evaluations


class Run:
    """Controller, recorder and checkpointer in one: notes what each is told, in order."""

    def __init__(self, tmp_path, lag, held_out="eval.jsonl", every=5):
        config = run_config(
            tmp_path,
            data={"eval": held_out},
            rollout={"max_policy_lag": lag},
            evaluation={"every": every},
            trainer={"steps": 12},
            algorithm={"importance_cap": 2.0} if lag else {},
        )
        self.said, self.meanwhile = [], object()
        self.evaluations = Evaluations(config, self, self, self, self.meanwhile)

    def begin_evaluation(self, state):
        self.said.append(("begin", state.step))

    def evaluate(self, state, meanwhile):
        assert meanwhile is self.meanwhile
        self.said.append(("wait", state.step))
        return {"eval/accuracy": float(state.version)}

    @contextmanager
    def phase(self, name):
        assert name == "evaluate"
        yield

    def record(self, metrics):
        self.said.append(("record", metrics))

    def record_late(self, metrics):
        self.said.append(("late", metrics))

    def evaluated(self, step, metrics):
        self.said.append(("checkpoint", step, metrics))


def state(step):
    return TrainState(step, step + 100)


def accuracy(step):
    return {"eval/accuracy": step + 100.0}


def test_without_a_lag_every_evaluation_is_waited_for(tmp_path):
    run = Run(tmp_path, 0)
    first = {"step": 0, "version": 100, **accuracy(0)}
    assert run.evaluations.first(state(0)) == accuracy(0) and run.said == [("wait", 0), ("record", first)]
    run.said.clear()
    assert run.evaluations.after(state(4), waits=False) == {} == run.evaluations.collect() and not run.said
    assert run.evaluations.after(state(5), waits=False) == accuracy(5)
    assert run.evaluations.after(state(6), waits=True) == accuracy(6)
    assert run.said == [("wait", 5), ("wait", 6)]


def test_with_a_lag_it_is_begun_and_told_of_its_own_step_when_it_is_collected(tmp_path):
    run = Run(tmp_path, 1)
    assert run.evaluations.first(state(0)) == {}
    assert run.said == [("begin", 0), ("record", {"step": 0, "version": 100})]
    for begun in (0, 5):
        run.said.clear()
        assert run.evaluations.collect() == accuracy(begun)
        late = {"step": begun, **accuracy(begun)}
        assert run.said == [("wait", begun), ("late", late), ("checkpoint", begun, accuracy(begun))]
        assert run.evaluations.collect() == {}  # once
        run.said.clear()
        assert run.evaluations.after(state(begun + 4), waits=False) == {} and not run.said
        assert run.evaluations.after(state(begun + 5), waits=False) == {} and run.said == [("begin", begun + 5)]
    run.evaluations.collect()
    run.said.clear()
    assert run.evaluations.after(state(15), waits=True) == accuracy(15) and run.said == [("wait", 15)]
    assert run.evaluations.collect() == {}


@pytest.mark.parametrize(
    ("lag", "step", "saved", "is_made"),
    [
        (1, 5, {}, True),
        (1, 5, accuracy(5), False),
        (1, 6, {}, False),
        (0, 5, {}, True),
        (0, 6, {}, False),
        (0, 12, {}, True),  # the last step, whatever its number
        (0, 12, accuracy(12), False),
    ],
)
def test_what_a_checkpoint_lacks_is_made_anew_where_it_was_due(tmp_path, lag, step, saved, is_made):
    run = Run(tmp_path, lag)
    found = run.evaluations.resumed(state(step), saved)
    assert found == (accuracy(step) if is_made else saved)
    told = [("wait", step), ("late", {"step": step, **found}), ("checkpoint", step, found)]
    assert run.said == (told if is_made else [])


def test_without_held_out_prompts_nothing_goes_on_beside(tmp_path):
    run = Run(tmp_path, 1, held_out=None)
    run.evaluations.first(state(0))
    run.evaluations.after(state(5), waits=False)
    assert run.evaluations.resumed(state(5), {}) == {}
    assert ("begin", 0) not in run.said and ("begin", 5) not in run.said
