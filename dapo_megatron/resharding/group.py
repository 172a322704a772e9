"""A process group between one trainer rank and the engines, outside the trainer's own world."""

import socket
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper

from dapo_megatron.errors import EngineError


def open_store(address: str, port: int, world: int, timeout_s: float) -> TCPStore:
    """The meeting place of a group of `world` ranks, on a port of `address` (0: a free one, store.port); does not wait.

    It is opened directly: under torchrun, which has a store of its own, torch's rendezvous() would not listen.
    """
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)


def join_as_sender(name: str, store: TCPStore, world: int, backend: str, timeout_s: float) -> dist.ProcessGroup:
    """Join a group as its rank 0 and wait for the engines to join.

    The engines join with SGLang's init_custom_process_group (srt/utils/common.py): the same store, prefix and helper,
    because torch has no public call for a group that spans two worlds.

    Raises:
        EngineError: an engine did not join in time.
    """
    try:
        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(backend),
            PrefixStore(name, store),
            group_name=name,  # type: ignore[arg-type]
            # At this NCCL's watchdog ends the whole process: the sender's own deadline must come first.
            timeout=timedelta(seconds=2 * timeout_s if backend == "nccl" else timeout_s),
        )
    except RuntimeError as e:
        raise EngineError(f"not all engines joined {name} in {timeout_s:.0f} s: {str(e).splitlines()[0]}") from None
    dist.distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def end_group(group: dist.ProcessGroup) -> None:
    """Close the sender's end of a group, whatever is under way in it: engines that still wait for it stop waiting.

    Under NCCL destroying a group would first wait for its collectives, one that hangs too.
    """
    dist.distributed_c10d._abort_process_group(group)


def sender_address(engine_urls: list[str]) -> str:
    """An address of this host that the engines can reach; loopback where all of them are on this host."""
    if all(urlsplit(url).hostname in ("127.0.0.1", "localhost") for url in engine_urls):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing: it only picks the interface towards the engine.
        probe.connect((urlsplit(engine_urls[0]).hostname, 9))
        return probe.getsockname()[0]
