"""A bucket's bytes, as its sender makes them."""

from collections.abc import Iterator
from math import prod

import torch

from dapo_megatron.actor.model import DTYPES
from dapo_megatron.errors import DapoError
from dapo_megatron.resharding.plan import Bucket


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
