"""Addresses of this node."""

from __future__ import annotations

import socket

import psutil


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
