"""The socket that a server listens on."""

from __future__ import annotations

import socket

from llm_parallel.errors import UserError
from llm_parallel.serve.guard import LOOPBACK_NAMES


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything is loaded, so that a port in use is said at once. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine ({error.strerror})") from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise UserError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}); give another --port, or 0 for any"
        ) from None
    return made


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    return host in LOOPBACK_NAMES or host.startswith("127.")


def written_address(listener: socket.socket) -> str:
    """Address and port of a bound socket, as they stand in a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
