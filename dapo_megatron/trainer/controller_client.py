"""The trainer's view of the controller: rank 0 asks, all ranks get the answer, each replica its own part of a batch."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from dapo_megatron.actor.packing_demands import packing_rules
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig
from dapo_megatron.data.snapshot import snapshot_parts
from dapo_megatron.distributed.agreement import all_agree, on_first_rank
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError
from dapo_megatron.keys import Keys
from dapo_megatron.messages import (
    Batch,
    BeginEvaluation,
    Done,
    Evaluate,
    Evaluation,
    Goodbye,
    Hello,
    NextBatch,
    Request,
    RestoreState,
    Welcome,
)
from dapo_megatron.rpc import RpcClient
from dapo_megatron.trainer.replica_batch import PartFetcher, ReplicaBatch, fetched_batch

R = TypeVar("R")


class StopAsked(Exception):
    """The run is to save and end; raised on every rank, and the controller's answer is not waited for any more."""


@dataclass(frozen=True)
class Meanwhile:
    """What may have to be done while the controller works."""

    is_due: Callable[[], bool]
    """Looked at now and then, on rank 0 alone."""
    act: Callable[[], None]
    """Called on every rank then; the wait goes on after it."""


class ControllerClient:
    """Collective over all ranks: every rank calls every method, in the same order."""

    def __init__(self, config: RunConfig, layout: Layout, address: str, keys: Keys):
        self.config, self.layout = config, layout
        self._rpc = RpcClient(address, keys) if layout.rank == 0 else None
        self._state: Future[bytes] | None = None
        """Of the controller, on rank 0."""
        self._fetcher: PartFetcher | None = None
        if layout.is_first_of_replica:
            # Sooner than the other ranks give up the wait for it.
            self._fetcher = PartFetcher(RpcClient(address, keys), config.deadlines.batch_part)

    def hello(self, state: TrainState, snapshot: bytes | None) -> list[list[int]]:
        """Start the controller; returns the fixed prompts for verification.

        Args:
            snapshot: the controller's state that a run goes on from, on rank 0.
        """
        if snapshot is not None:
            what = "giving the controller its state"
            on_first_rank(what, self.layout, lambda: self._restore(snapshot), may_take_long=True)
        return self._ask(Hello(state.step, snapshot is not None), Welcome).verify_prompts

    def next_batch(self, step: int, version: int, meanwhile: Meanwhile) -> tuple[ReplicaBatch, dict[str, float]]:
        """This replica's batch of a step, and the rollout's metrics."""
        self.state()  # the next batch takes its place
        batch = self._ask(NextBatch(step, version), Batch, meanwhile)
        rules = packing_rules(self.config)
        mine = fetched_batch(self._fetcher, self.layout, rules, step, version, batch.parts)
        if self.layout.rank == 0:
            assert self._fetcher is not None
            self._state = self._fetcher.begin_state(step, batch.state_parts)
        return mine, batch.metrics

    def state(self) -> bytes:
        """The controller's state that belongs to the last batch, or that the run went on from; empty but on rank 0."""
        with all_agree("fetching the controller's state", self.layout):
            return b"" if self._state is None else self._state.result()

    def begin_evaluation(self, state: TrainState) -> None:
        """Have the live version evaluated beside what is asked next; `evaluate` of the same state gives its metrics."""
        self._ask(BeginEvaluation(state.step, state.version), Done)

    def evaluate(self, state: TrainState, meanwhile: Meanwhile) -> dict[str, float]:
        """Evaluation metrics of the live version, or of the one whose evaluation was begun; empty without held-out
        prompts."""
        if self.config.data.eval is None:
            return {}
        self.state()  # nothing else is answered while an evaluation is waited for
        return self._ask(Evaluate(state.step, state.version), Evaluation, meanwhile).metrics

    def goodbye(self) -> None:
        """End the controller."""
        self._ask(Goodbye(), Done)

    def close(self) -> None:
        """End the connections."""
        if self._fetcher is not None:
            self._fetcher.close()
        if self._rpc is not None:
            self._rpc.close()

    def _restore(self, snapshot: bytes) -> None:
        assert self._rpc is not None
        for part in snapshot_parts(snapshot):
            self._rpc.ask(RestoreState(bytes(part)), deadline_s=self.config.deadlines.batch)
        self._state = Future()
        self._state.set_result(snapshot)

    def _ask(self, request: Request, kind: type[R], meanwhile: Meanwhile | None = None) -> R:
        """The reply, on every rank."""
        if self._rpc is not None:
            self._rpc.send(request, deadline_s=self.config.trainer.batch_timeout_s)

        def receive() -> R | None:
            assert self._rpc is not None
            reply = self._rpc.receive(meanwhile.is_due if meanwhile else lambda: False)
            if reply is None or isinstance(reply, kind):
                return reply
            raise DapoError(f"the controller answered {type(request).__name__} with {type(reply).__name__}")

        what = f"asking the controller ({type(request).__name__})"
        while (reply := on_first_rank(what, self.layout, receive, may_take_long=True)) is None:
            assert meanwhile is not None
            meanwhile.act()
        return reply
