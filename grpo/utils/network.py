"""Which of a machine's networks leads to another one."""

from __future__ import annotations

import fcntl
import socket
from contextlib import suppress

_SIOCGIFADDR = 0x8915  # Linux's question for the IPv4 address of an interface, see netdevice(7)


def address_towards(host: str, port: int) -> str:
    """That of the network through which this machine reaches another one, or itself. Nothing is sent."""
    (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind) as asking:
        asking.connect(address)
        return str(asking.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the interface with an IPv4 address of this machine; None where none is found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no such address
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
