"""The trainer's view of the controller: rank 0 asks, all ranks get the answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dapo_megatron.batching.batch import StepBatch
from dapo_megatron.batching.wire import decode_step_batch
from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.agreement import broadcast_bytes, on_first_rank
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError
from dapo_megatron.keys import Keys
from dapo_megatron.messages import Batch, Done, Evaluate, Evaluation, Goodbye, Hello, NextBatch, Request, Welcome
from dapo_megatron.rpc import RpcClient
from dapo_megatron.run_folder import RunFolder

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

    def __init__(self, config: RunConfig, layout: Layout, folder: RunFolder, address: str, keys: Keys):
        self.config, self.layout, self.folder = config, layout, folder
        self._rpc = RpcClient(address, keys) if layout.rank == 0 else None

    def hello(self, state: TrainState, snapshot: bytes | None) -> list[list[int]]:
        """Start the controller, or resume it from its snapshot; returns the fixed prompts for verification."""
        return self._ask(Hello(snapshot, state.step), Welcome).verify_prompts

    def next_batch(self, step: int, version: int, meanwhile: Meanwhile) -> tuple[StepBatch, dict[str, float], bytes]:
        """The batch of a step, the rollout's metrics, and the controller's state for the checkpoint."""
        payload = b""

        def keep_payload(batch: Batch) -> Batch:
            nonlocal payload
            payload = batch.payload
            if self.config.observe.dump_batches:
                path = self.folder.batch(step)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(payload)
            return Batch(b"", batch.metrics, batch.snapshot)

        batch = self._ask(NextBatch(step, version), Batch, meanwhile, keep_payload)
        return decode_step_batch(broadcast_bytes(payload, self.layout)), batch.metrics, batch.snapshot

    def evaluate(self, state: TrainState, meanwhile: Meanwhile) -> dict[str, float]:
        """Evaluation metrics of the live version; empty without held-out prompts."""
        if self.config.data.eval is None:
            return {}
        return self._ask(Evaluate(state.step, state.version), Evaluation, meanwhile).metrics

    def goodbye(self) -> None:
        """End the controller."""
        self._ask(Goodbye(), Done)

    def _ask(
        self,
        request: Request,
        kind: type[R],
        meanwhile: Meanwhile | None = None,
        on_arrival: Callable[[R], R] = lambda reply: reply,
    ) -> R:
        """The reply, on every rank; `on_arrival` makes of it, on rank 0, what the other ranks get."""
        if self._rpc is not None:
            self._rpc.send(request, deadline_s=self.config.trainer.batch_timeout_s)

        def receive() -> R | None:
            assert self._rpc is not None
            reply = self._rpc.receive(meanwhile.is_due if meanwhile else lambda: False)
            if reply is None:
                return None
            if not isinstance(reply, kind):
                raise DapoError(f"the controller answered {type(request).__name__} with {type(reply).__name__}")
            return on_arrival(reply)

        what = f"asking the controller ({type(request).__name__})"
        while (reply := on_first_rank(what, self.layout, receive, may_take_long=True)) is None:
            assert meanwhile is not None
            meanwhile.act()
        return reply
