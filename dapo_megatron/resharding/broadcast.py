"""Buckets by broadcast: a process group of each stage's sender and all engines, outside the trainer's own world.

filled        the sender's copy, whole tensors one behind the other in the engines' type
broadcast     one collective of the weight group, and one call to each engine that receives and loads it
arrived       the collective is over and every engine has answered; waited for until the deadline
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate

import torch
import torch.distributed as dist

from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import Layout
from dapo_megatron.engines.all_engines import AllEngines
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.errors import DapoError, EngineError
from dapo_megatron.resharding.group import end_group, join_as_sender, open_store, sender_address
from dapo_megatron.resharding.plan import Bucket

LOOK_S = 5e-4

Load = tuple[EngineControl, Future[None]]
"""An engine, and its answer to the call that receives a bucket."""


class BroadcastTransport:
    """A group of each stage's sender with all engines; a WeightTransport."""

    def __init__(self, config: RunConfig, layout: Layout, ports: Sequence[int] | None):
        """
        Args:
            ports: as for Pusher.
        """
        self._layout, self._keeps_kv, self._timeout_s = layout, config.keeps_kv, config.deadlines.engine_call
        self._ports, self._opened = ports or [0] * layout.pp_size, 0
        self._engines = AllEngines()
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""

    def connect(self, engines: AllEngines) -> None:
        """Open this stage's group.

        Raises:
            EngineError: an engine did not join.
        """
        self._engines = engines
        stage, timeout = self._layout.pp_rank, self._timeout_s
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        name, address = f"weights-{stage}-{time.time_ns()}", sender_address([e.url for e in engines.engines])
        *firsts, world = accumulate((e.tensor_parallel_size for e in engines.engines), initial=1)
        ranks = dict(zip(engines.engines, firsts, strict=True))
        port = self._ports[(self._opened * self._layout.pp_size + stage) % len(self._ports)]
        self._opened += 1
        store = open_store(address, port, world, timeout)
        joins = engines.start(lambda e: e.join_group(name, address, store.port, ranks[e], world, backend))
        self._group, self._group_name = join_as_sender(name, store, world, backend, timeout), name
        for _, join in joins:
            join.result()

    def begin(self) -> None:
        """Open a weight-update session on every engine."""
        self._engines.on_all(EngineControl.begin_update)

    def send(self, bucket: Bucket, flat: torch.Tensor, *, version: int, is_last: bool) -> "Broadcast":
        """Broadcast a bucket; with the last one the engines also drop their KV cache, if they are not to keep it."""
        if self._group is None:
            raise DapoError("a push needs the engines: connect comes first")
        flush_cache = is_last and not self._keeps_kv
        loads = self._engines.start(lambda e: _receive(e, self._group_name, bucket, flush_cache))
        return Broadcast(bucket, flat, self._group, loads, self._timeout_s)

    def commit(self, version: int) -> None:
        """Close the sessions: every engine has loaded every bucket."""
        self._engines.on_all(EngineControl.end_update)

    def close(self) -> None:
        """End the sender's side of the group."""
        if self._group is not None:
            end_group(self._group)
            self._group = None


def _receive(engine: EngineControl, group: str, bucket: Bucket, flush_cache: bool) -> None:
    engine.receive_tensors(group, bucket.names, bucket.shapes, bucket.dtype, flush_cache=flush_cache)


class Broadcast:
    """A bucket under way; made when the engines have been asked to receive it."""

    def __init__(
        self, bucket: Bucket, flat: torch.Tensor, group: dist.ProcessGroup, loads: Sequence[Load], timeout_s: float
    ):
        """
        Args:
            flat: the bucket, not to be changed before it has arrived.
            timeout_s: seconds from now until it must have arrived.
        """
        self._bucket, self._flat, self._loads, self._timeout_s = bucket, flat, loads, timeout_s
        self._end = time.monotonic() + timeout_s
        try:
            self._work = dist.broadcast(flat, group=group, group_src=0, async_op=True)
        except RuntimeError as e:
            raise self._failed(e) from None

    def wait(self) -> None:
        """Wait until the collective is over and every engine has loaded the bucket.

        The deadline is not the backend's: NCCL only enqueues, and its own wait returns at once.

        Raises:
            EngineError: names the engine and the bucket.
        """
        sent, missing = False, list(self._loads)
        while True:
            if not sent and self._work.is_completed():
                sent = self._check_sent()
            missing = [(engine, load) for engine, load in missing if not self._has_loaded(engine, load)]
            if sent and not missing:
                return
            if time.monotonic() > self._end:
                engines = [engine for engine, _ in (missing or self._loads)]
                raise EngineError(
                    f"{self._bucket} did not arrive at {_urls(engines)} within {self._timeout_s:.0f} s: see "
                    "logs/latest/engine-*.log"
                )
            time.sleep(LOOK_S)

    def _check_sent(self) -> bool:
        try:
            self._work.wait()
        except RuntimeError as e:
            raise self._failed(e) from None
        return True

    def _has_loaded(self, engine: EngineControl, load: Future[None]) -> bool:
        if not load.done():
            return False
        try:
            load.result()
        except DapoError as e:
            raise EngineError(f"{self._bucket} did not arrive at {engine.url}: {e}") from None
        return True

    def _failed(self, error: RuntimeError) -> EngineError:
        urls = _urls([engine for engine, _ in self._loads])
        return EngineError(f"broadcasting {self._bucket} to {urls} failed: {str(error)[:200]}")


def _urls(engines: Sequence[EngineControl]) -> str:
    return ", ".join(engine.url for engine in engines)
