"""Addresses of this node."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections import Counter
from collections.abc import Sequence

import psutil

ASKED = 8
"""Other nodes that are tried for the way to them."""
LOOPBACK = "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Network interface that has ``address``; gloo and NCCL must not choose another."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.split("%")[0] == address for item in addresses):
            return name
    return None


def own_address(towards: tuple[str, int]) -> str:
    """Address of this node on the way to the controller; nothing is sent."""
    family = socket.AF_INET6 if ":" in towards[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(towards)
        return probe.getsockname()[0]


def address_for(others: Sequence[str], own: str) -> str:
    """Address of this node that other nodes reach. others: their names or addresses; own: this node's name or address.

    It is the one from which this node sends to them. What its own name leads to is asked last: Debian's and Ubuntu's
    installers write 127.0.1.1 beside it into /etc/hosts, where no other node gets an answer. Raises OSError if there
    is no such address.
    """
    found: Counter[str] = Counter()
    for other in others[:ASKED]:
        with contextlib.suppress(OSError):
            address = resolve(other)
            if not is_loopback(address):
                found[own_address((address, 9))] += 1
    ways = [address for address, _ in found.most_common() if not is_loopback(address)]
    if ways:
        return ways[0]
    with contextlib.suppress(OSError):
        named = resolve(own)
        if not is_loopback(named):
            return named
        if all(is_loopback(resolve(other)) for other in others):
            return LOOPBACK  # one node, or several that are all of this machine
    raise OSError(f"no address of this node is known that {', '.join(others[:ASKED])} can reach")


def resolve(name: str) -> str:
    """The first address of a host, IPv4 before IPv6. Raises OSError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda item: item[0] != socket.AF_INET)[4][0])


def is_loopback(address: str) -> bool:
    """Whether an address leads to its own machine only."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
