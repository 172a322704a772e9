"""One bucket on its way from a sender to all engines, while the next one is gathered.

filled        the sender's copy, whole tensors one behind the other in the engines' type
broadcast     one collective of the weight group, and one call to each engine that receives and loads it
arrived       the collective is over and every engine has answered; waited for until the deadline
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from math import prod

import torch
import torch.distributed as dist

from dapo_megatron.actor.model import DTYPES
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.errors import DapoError, EngineError
from dapo_megatron.resharding.plan import Bucket

LOOK_S = 5e-4

Load = tuple[EngineControl, Future[None]]
"""An engine, and its answer to the call that receives a bucket."""


def fill(bucket: Bucket, tensors: Iterator[tuple[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Take a bucket's tensors, gathered as they are asked for; returns them flat, [bucket.bytes] uint8.

    Raises:
        DapoError: another tensor comes than the plan has.
    """
    flat, start = None, 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        found, tensor = next(tensors, ("no more", None))
        if found != name or tensor is None:
            raise DapoError(f"the push plan expects {name}, the model has {found}")
        if flat is None:  # not before: only now what the bucket before was made of is gone
            flat = torch.empty(bucket.bytes, dtype=torch.uint8, device=device)
        place = flat.view(DTYPES[bucket.dtype])[start : start + prod(shape)]
        place.view(shape).copy_(tensor)
        start += prod(shape)
        del tensor  # before the next one is gathered
    assert flat is not None, "a bucket has tensors"
    return flat


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
                    f"{_label(self._bucket)} did not arrive at {_urls(engines)} within {self._timeout_s:.0f} s: see "
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
            raise EngineError(f"{_label(self._bucket)} did not arrive at {engine.url}: {e}") from None
        return True

    def _failed(self, error: RuntimeError) -> EngineError:
        urls = _urls([engine for engine, _ in self._loads])
        return EngineError(f"broadcasting {_label(self._bucket)} to {urls} failed: {str(error)[:200]}")


def _label(bucket: Bucket) -> str:
    return f"bucket {bucket.names[0]} .. {bucket.names[-1]} ({bucket.bytes} bytes)"


def _urls(engines: Sequence[EngineControl]) -> str:
    return ", ".join(engine.url for engine in engines)
