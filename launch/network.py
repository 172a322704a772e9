"""What this machine's kernel says of its network."""

import socket

import psutil

from dapo_megatron.errors import ConfigError


def interface_towards(address: str) -> str:
    """The network interface whose address this machine has towards another one, or towards itself.

    Args:
        address: host name or IPv4 address.

    Raises:
        ConfigError: the name has no address, or no route leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # of a datagram socket: it sends nothing, and chooses the route
        except OSError as e:
            raise ConfigError(
                f"{socket.gethostname()} has no route to {address} ({e.strerror}): name its network in launch.interface"
            ) from None
        own = probe.getsockname()[0]
    # By the address, not by the route: towards itself the route is loopback, but not the address.
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == own for a in addresses):
            return name
    raise ConfigError(f"no interface of {socket.gethostname()} has its address {own}: name one in launch.interface")


def require_interface(name: str) -> None:
    """Raise ConfigError if this machine has no such interface."""
    if name not in (there := psutil.net_if_addrs()):
        raise ConfigError(
            f"launch.interface={name} is no interface of {socket.gethostname()}: choose of {', '.join(there)}"
        )
