"""A process group between one trainer rank and the engines, outside the trainer's own world."""

import socket
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper

from dapo_megatron.errors import DapoError


def join_as_sender(name: str, address: str, port: int, world: int, backend: str, timeout_s: float) -> dist.ProcessGroup:
    """Open a group as its rank 0, at tcp://address:port, and wait for the engines to join.

    The engines join with SGLang's init_custom_process_group (srt/utils/common.py): the same store, prefix and helper,
    because torch has no public call for a group that spans two worlds. The store is opened directly: torch's
    rendezvous() would not listen under torchrun, which has a store of its own.

    Raises:
        DapoError: an engine did not join in time.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, world, is_master=True, timeout=timeout, multi_tenant=True)
    except dist.DistError as e:
        raise DapoError(
            f"not all engines joined {name} at {address}:{port} in {timeout_s:.0f} s: {str(e).splitlines()[0]}"
        ) from None
    group, _ = _new_process_group_helper(
        world, 0, [], dist.Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    dist.distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def sender_address(engine_urls: list[str]) -> str:
    """An address of this host that the engines can reach; loopback where all of them are on this host."""
    if all(urlsplit(url).hostname in ("127.0.0.1", "localhost") for url in engine_urls):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing: it only picks the interface towards the engine.
        probe.connect((urlsplit(engine_urls[0]).hostname, 9))
        return probe.getsockname()[0]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
