"""The environment of every process of a job: a function of its place and of what its node's environment holds. Pure.

What the two sides of a weight group must have in common, they have from `shared_environment`.
"""

from collections.abc import Mapping, Sequence

from dapo_megatron.config import RunConfig
from dapo_megatron.engines.command import HUGE_PAGES, engine_environment
from dapo_megatron.errors import ConfigError
from launch.topology import ControllerPlace, EnginePlace, Place, RankPlace

VISIBLE = "CUDA_VISIBLE_DEVICES"


def shared_environment(
    config: RunConfig, base: Mapping[str, str], *, cpu: bool, interface: str | None = None
) -> dict[str, str]:
    """What all processes of a node have.

    Args:
        base: the environment that the node's processes would have without us.
        cpu: no process has a device.
        interface: network interface of gloo and NCCL; None leaves the choice to them, or to `base`.
    """
    environment = dict(base)
    if cpu:
        environment["OMP_NUM_THREADS"] = "1"
        environment.setdefault(*HUGE_PAGES)
    else:
        # SGLang gives its own processes these where they are unset; a group's members must agree.
        environment.setdefault("NCCL_CUMEM_ENABLE", "0")
        environment.setdefault("NCCL_NVLS_ENABLE", "0")
    if interface is not None:
        environment |= interface_environment(interface)
    if config.engine.deterministic:
        # Sets of strings (sympy's symbols) then have the same order in every process.
        environment["PYTHONHASHSEED"] = "0"
    return environment


def interface_environment(interface: str) -> dict[str, str]:
    """What makes gloo and NCCL take a network interface."""
    return {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",  # exactly this one: a plain name is a prefix to NCCL
    }


def environment_of_engine(shared: Mapping[str, str], place: EnginePlace) -> dict[str, str]:
    """Of an engine."""
    return engine_environment(_with_devices(shared, place, cpu=not place.devices), cpu=not place.devices)


def environment_of_controller(shared: Mapping[str, str], place: ControllerPlace, *, cpu: bool) -> dict[str, str]:
    """Of the controller, which sees no device: all of them are somebody's."""
    return _with_devices(shared, place, cpu=cpu)


def environment_of_rank(
    shared: Mapping[str, str], ranks: Sequence[RankPlace], rank: int, meeting_port: int
) -> dict[str, str]:
    """Of a trainer rank, as torchrun would set it: how all of `ranks` meet by torch's env:// rendezvous."""
    place = ranks[rank]
    return _with_devices(shared, place, cpu=not place.devices) | {
        "WORLD_SIZE": str(len(ranks)),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "MASTER_ADDR": ranks[0].node.address,
        "MASTER_PORT": str(meeting_port),
        "RANK": str(rank),
        # Among the devices that it sees.
        "LOCAL_RANK": "0" if place.devices else str(place.local_rank),
    }


def visible_devices(devices: Sequence[int], seen: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a process.

    Args:
        devices: by their numbers among those that the job sees on the node.
        seen: CUDA_VISIBLE_DEVICES of the job there: numbers or UUIDs; None: it sees all of the node's.

    Raises:
        ConfigError: the job sees fewer.
    """
    if seen is None:
        return ",".join(map(str, devices))
    names = [name.strip() for name in seen.split(",") if name.strip()]
    if devices and max(devices) >= len(names):
        raise ConfigError(
            f"{VISIBLE}={seen} shows {len(names)} GPUs, a process was given number {max(devices)}: show all that the "
            "job was placed on"
        )
    return ",".join(names[device] for device in devices)


def _with_devices(shared: Mapping[str, str], place: Place, *, cpu: bool) -> dict[str, str]:
    return dict(shared) if cpu else dict(shared) | {VISIBLE: visible_devices(place.devices, shared.get(VISIBLE))}
