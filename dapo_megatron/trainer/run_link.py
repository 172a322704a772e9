"""The trainer's view of the controller and of the run folder: rank 0 talks and writes, all ranks get the answer."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from dapo_megatron.batching.batch import StepBatch
from dapo_megatron.batching.wire import decode_step_batch
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.errors import DapoError
from dapo_megatron.link import Batch, Evaluate, Goodbye, Hello, LinkClient, NextBatch, Request
from dapo_megatron.observe.metrics import MetricsWriter
from dapo_megatron.observe.progress import write_status


class RunLink:
    """Collective over all ranks: every rank calls every method, in the same order."""

    def __init__(self, config: RunConfig, layout: Layout, address: str):
        self.config, self.layout, self.run_dir = config, layout, Path(config.run_dir)
        self._client = LinkClient(address) if layout.rank == 0 else None
        self._writer: MetricsWriter | None = None

    def hello(self, done: int, resume: Path | None) -> list[list[int]]:
        """Start or resume the controller; returns the fixed prompts for the comparison after a push."""
        self.status("start")
        snapshot = (resume / "controller.msgpack").read_bytes() if resume is not None else None
        welcome = self._ask(Hello(snapshot, done))
        if self.layout.rank == 0:
            observe = self.config.observe
            self._writer = MetricsWriter(
                self.run_dir,
                tensorboard=observe.tensorboard,
                wandb_project=observe.wandb_project,
                resume_step=done if resume is not None else None,
            )
        return welcome.verify_prompts

    def next_batch(self, step: int, version: int) -> tuple[StepBatch, dict[str, float], bytes]:
        """The batch of a step, the rollout's metrics, and the controller's state for the checkpoint."""
        self.status("generate")
        batch: Batch = self._ask(NextBatch(step, version))
        if self.config.observe.dump_batches and self.layout.rank == 0:
            folder = self.run_dir / "batches"
            folder.mkdir(exist_ok=True)
            (folder / f"step_{step:06d}.msgpack").write_bytes(batch.payload)
        return decode_step_batch(batch.payload), batch.metrics, batch.snapshot

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluation metrics of the live version; empty without held-out prompts."""
        if self.config.data.eval is None:
            return {}
        self.status("evaluate")
        return self._ask(Evaluate(step)).metrics

    def goodbye(self) -> None:
        """End the controller."""
        self._ask(Goodbye())
        self.status("done")

    def record(self, metrics: dict[str, float]) -> None:
        """Write one step's metrics."""
        if self._writer is not None:
            self._writer.write({"time": time.time()} | metrics)

    def status(self, phase: str) -> None:
        """Show the current phase."""
        if self.layout.rank == 0:
            write_status(self.run_dir, "trainer", phase, "")

    def _ask(self, request: Request):
        message: list = [None, None]
        if self._client is not None:
            try:
                message[0] = self._client.ask(request, deadline_s=self.config.trainer.batch_timeout_s)
            except DapoError as e:
                message[1] = str(e)
        return _broadcast(message, self.layout)


def _broadcast(message: list, layout: Layout):
    """Rank 0's (reply, error) on all ranks; a batch's payload goes as one tensor instead of through pickle."""
    payload = b""
    if isinstance(message[0], Batch):
        payload, message[0].payload = message[0].payload, b""
    message = [*message, len(payload)]
    dist.broadcast_object_list(message, src=0, group=layout.control)
    reply, error, size = message
    if error is not None:
        raise DapoError(error)
    if size:
        flat = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(size, dtype=torch.uint8)
        )
        dist.broadcast(flat, src=0, group=layout.control)
        reply.payload = flat.numpy().tobytes()
    return reply
