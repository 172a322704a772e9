"""Processes that a benchmark spreads over its nodes and tells over a pipe when it is their turn."""

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.nodes import Node
from launch.environment import interface_environment


@dataclass(frozen=True)
class Worker:
    """A process on a node."""

    name: str
    pipe: Connection

    def answer(self, timeout_s: float) -> Any:
        """What it has to say.

        Raises:
            SystemExit: it ended, or said nothing in time.
        """
        if not self.pipe.poll(timeout_s):
            raise SystemExit(f"{self.name} gave no answer within {timeout_s:.0f} s")
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} has ended: what it said is above") from None


def take_turn(workers: Sequence[Worker], message: object, timeout_s: float) -> Any:
    """Tell all of them, wait for all of them; what the first one answered."""
    for worker in workers:
        worker.pipe.send(message)
    return [worker.answer(timeout_s) for worker in workers][0]


@contextmanager
def started(name: str, work: Callable[..., None], node: Node, *arguments: object) -> Iterator[Worker]:
    """A process that runs work(pipe, *arguments) on a node, and ends with the block."""
    context = mp.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_on_node, args=(node, work, its, *arguments), daemon=True)
    process.start()
    its.close()
    try:
        yield Worker(name, ours)
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _on_node(node: Node, work: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    node.enter()
    os.environ |= interface_environment(node.interface)
    torch.set_num_threads(1)
    try:
        work(pipe, *arguments)
    except (EOFError, ConnectionResetError):  # the benchmark has closed the pipe: it is over
        os._exit(0)
