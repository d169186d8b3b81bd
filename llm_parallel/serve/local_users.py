"""Whose process is at the other end of a connection within this machine.

A port on loopback is closed to other machines, and open to every user of this one: on a shared node, strangers could
use a model, read what is to be judged, or judge in somebody's name. Linux lists for each connection the user whose
process holds it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

End = tuple[str, int]
"""Address and port."""


def is_ours(client: End | None, server: End | None) -> bool:
    """Whether the process at the ``client``'s end of a connection is of this user, or of root, who can do all anyway.
    False where it has gone, since the system no longer tells whose it was. True on systems that do not list
    connections (all but Linux), where the port's own limits are all there is."""
    if not any(table.exists() for table in TABLES):
        return True
    if client is None or server is None:
        return False
    try:
        return owner(client, server) in (0, os.getuid())
    except ValueError:  # no address
        return False


def owner(client: End, server: End) -> int | None:
    """User id of the process that holds the ``client``'s end; None if there is no such connection, or nobody holds it
    any more."""
    for table, pair in zip(TABLES, _as_listed(client, server)):
        with contextlib.suppress(OSError):
            text = table.read_text()
            at = text.find(pair)
            if at >= 0:
                # state, queues, timer, retransmissions, user, time-outs, inode: 0 when nobody holds it
                fields = text[at + len(pair) : text.find("\n", at)].split()
                return int(fields[4]) if fields[6] != "0" else None
    return None


def _as_listed(client: End, server: End) -> Iterator[str]:
    """Both ends as the tables write them: of IPv4, and of IPv6, where addresses of IPv4 are mapped."""
    ends = []
    for host, port in (client, server):
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        ends.append((address, port))
    four = [_words(address.packed) + f":{port:04X}" for address, port in ends if address.version == 4]
    yield f": {four[0]} {four[1]} " if len(four) == 2 else "\0"
    six = [
        _words(address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed) + f":{port:04X}"
        for address, port in ends
    ]
    yield f": {six[0]} {six[1]} "


def _words(packed: bytes) -> str:
    """An address as words in this machine's order of bytes, in hexadecimal digits."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))
