"""When the held-out prompts are evaluated, and where the result goes.

max_policy_lag 0    after the steps that are evaluated, and training waits: nothing else is with the engines
max_policy_lag N    beside the next step: begun after step k, collected at the end of step k + 1. Training waits for
                    what is left then, which is no more than the longest answer where the engines have room for all of
                    them. The push of step k + 1 waits for no answer, so the last tokens of the longest ones may be of
                    the next version (eval/other_version_share). The result is recorded under step k, and added to its
                    checkpoint.

With a lag, what ends a run is still measured on the weights that it ends with: the last step is waited for, and where
a collected evaluation has reached trainer.stop_at, one of the newest weights decides. A run that ends before it could
wait for one, or collect it, leaves a checkpoint without an evaluation, and whoever goes on from that makes it anew.
"""

from dapo_megatron.checkpoint.distributed import Checkpointer
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig
from dapo_megatron.observe import catalog as m
from dapo_megatron.trainer.controller_client import ControllerClient, Meanwhile
from dapo_megatron.trainer.recorder import Recorder


class Evaluations:
    """Of one run; collective over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        controller: ControllerClient,
        recorder: Recorder,
        checkpointer: Checkpointer,
        meanwhile: Meanwhile,
    ):
        """`meanwhile`: what may have to be done while an evaluation is waited for."""
        self._config, self._controller, self._recorder = config, controller, recorder
        self._checkpointer, self._meanwhile = checkpointer, meanwhile
        self._has_prompts = config.data.eval is not None
        self._is_beside = config.rollout.max_policy_lag > 0 and self._has_prompts
        self._begun: TrainState | None = None

    def first(self, state: TrainState) -> dict[str, float]:
        """Of a new run, and its first record; returns what is known."""
        known = self._begin(state) if self._is_beside else self._wait_for(state)
        self._recorder.record({m.STEP: state.step, m.VERSION: state.version} | known)
        return known

    def resumed(self, state: TrainState, saved: dict[str, float]) -> dict[str, float]:
        """Of the checkpoint that a run goes on from; made anew where it was due, and has not come.

        Args:
            saved: what the checkpoint holds of it.
        """
        is_due = self._is_due(state) or state.step >= self._config.trainer.steps
        if saved or not self._has_prompts or not is_due:
            return saved
        return self._told(state, self._wait_for(state))

    def collect(self) -> dict[str, float]:
        """Of the step before, if it was begun then; recorded, and added to its checkpoint."""
        if self._begun is None:
            return {}
        state, self._begun = self._begun, None
        return self._told(state, self._wait_for(state))

    def after(self, state: TrainState, *, waits: bool) -> dict[str, float]:
        """Of a step, if it is evaluated and waited for; begun, if it is evaluated beside the next one.

        Args:
            waits: whether it is evaluated and waited for in any case.
        """
        if waits or (self._is_due(state) and not self._is_beside):
            return self._wait_for(state)
        return self._begin(state) if self._is_due(state) else {}

    def _is_due(self, state: TrainState) -> bool:
        return state.step % self._config.evaluation.every == 0

    def _begin(self, state: TrainState) -> dict[str, float]:
        self._controller.begin_evaluation(state)
        self._begun = state
        return {}

    def _wait_for(self, state: TrainState) -> dict[str, float]:
        with self._recorder.phase("evaluate"):
            return self._controller.evaluate(state, self._meanwhile)

    def _told(self, state: TrainState, metrics: dict[str, float]) -> dict[str, float]:
        self._recorder.record_late({m.STEP: state.step} | metrics)
        self._checkpointer.evaluated(state.step, metrics)
        return metrics
