"""The trainer's view of the controller: rank 0 asks, all ranks get the answer."""

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


class ControllerClient:
    """Collective over all ranks: every rank calls every method, in the same order."""

    def __init__(self, config: RunConfig, layout: Layout, folder: RunFolder, address: str, keys: Keys):
        self.config, self.layout, self.folder = config, layout, folder
        self._rpc = RpcClient(address, keys) if layout.rank == 0 else None

    def hello(self, state: TrainState, snapshot: bytes | None) -> list[list[int]]:
        """Start the controller, or resume it from its snapshot; returns the fixed prompts for verification."""
        return self._ask(Hello(snapshot, state.step), Welcome).verify_prompts

    def next_batch(self, step: int, version: int) -> tuple[StepBatch, dict[str, float], bytes]:
        """The batch of a step, the rollout's metrics, and the controller's state for the checkpoint."""
        payload = b""

        def ask() -> Batch:
            nonlocal payload
            batch = self._on_rank_0(NextBatch(step, version), Batch)
            payload = batch.payload
            if self.config.observe.dump_batches:
                path = self.folder.batch(step)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(payload)
            return Batch(b"", batch.metrics, batch.snapshot)

        batch = on_first_rank("waiting for the batch", self.layout, ask, may_take_long=True)
        return decode_step_batch(broadcast_bytes(payload, self.layout)), batch.metrics, batch.snapshot

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Evaluation metrics of the live version; empty without held-out prompts."""
        if self.config.data.eval is None:
            return {}
        return self._ask(Evaluate(state.step, state.version), Evaluation).metrics

    def goodbye(self) -> None:
        """End the controller."""
        self._ask(Goodbye(), Done)

    def _ask(self, request: Request, kind: type[R]) -> R:
        what = f"asking the controller ({type(request).__name__})"
        return on_first_rank(what, self.layout, lambda: self._on_rank_0(request, kind), may_take_long=True)

    def _on_rank_0(self, request: Request, kind: type[R]) -> R:
        assert self._rpc is not None
        reply = self._rpc.ask(request, deadline_s=self.config.trainer.batch_timeout_s)
        if not isinstance(reply, kind):
            raise DapoError(f"the controller answered {type(request).__name__} with {type(reply).__name__}")
        return reply
