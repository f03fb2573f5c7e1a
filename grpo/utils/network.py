"""Addresses and interfaces of this machine: the network that leads to another machine."""

from __future__ import annotations

import fcntl
import socket
from contextlib import suppress

_SIOCGIFADDR = 0x8915  # Linux's request for the IPv4 address of an interface, see netdevice(7)


def address_towards(host: str, port: int) -> str:
    """Return this machine's address on the network through which it reaches `host`. Sends nothing."""
    (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
