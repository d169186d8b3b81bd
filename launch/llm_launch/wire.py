"""Messages between controller, agents and workers: JSON objects with their length in front, over authenticated sockets.

Both ends of a TCP connection prove that they hold the run's secret (HMAC-SHA256 of the other's fresh random number,
and of who they are) before anything else is read; a message is at most ``MAX_BYTES`` long and never unpickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from typing import Any

LENGTH = struct.Struct("!I")
MAX_BYTES = 64 << 20
NONCE_BYTES = 32
AUTHENTICATION_S = 5.0

Message = dict[str, Any]


class WireError(ConnectionError):
    """The other end does not belong to this run, or does not follow the protocol."""


def encode(message: Message) -> bytes:
    """A message as it goes over the wire."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(data)) + data


def new_secret() -> str:
    """A fresh secret for one run, as hexadecimal digits."""
    return secrets.token_hex(32)


def _proof(secret: str, role: bytes, nonce: bytes) -> bytes:
    return hmac.new(secret.encode(), role + nonce, hashlib.sha256).digest()


def _length(header: bytes) -> int:
    (size,) = LENGTH.unpack(header)
    if size > MAX_BYTES:
        raise WireError(f"a message of {size} bytes announced; the other end is not of this run")
    return size


class Channel:
    """One authenticated connection of an asyncio program."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def receive(self) -> Message | None:
        """Next message; None when the other end has closed. Raises ConnectionError if it broke."""
        try:
            size = _length(await self._reader.readexactly(LENGTH.size))
            return json.loads(await self._reader.readexactly(size))
        except asyncio.IncompleteReadError:
            return None

    def send(self, message: Message) -> None:
        """Hands a message to the system; what cannot be delivered is lost with the connection."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def drain(self) -> None:
        """Waits until what was sent has left this process."""
        await self._writer.drain()

    def close(self) -> None:
        """Closes the connection; both ends see its end."""
        self._writer.close()


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> Channel:
    """The server's end of a new connection. Raises WireError if the client does not prove the secret in time."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    writer.write(nonce)
    try:
        answer = await asyncio.wait_for(reader.readexactly(2 * NONCE_BYTES), AUTHENTICATION_S)
    except (asyncio.IncompleteReadError, asyncio.TimeoutError, ConnectionError) as error:
        writer.close()
        raise WireError("the other end did not authenticate") from error
    if not hmac.compare_digest(answer[:NONCE_BYTES], _proof(secret, b"client", nonce)):
        writer.close()
        raise WireError("the other end does not know the run's secret")
    writer.write(_proof(secret, b"server", answer[NONCE_BYTES:]))
    return Channel(reader, writer)


async def connect(host: str, port: int, secret: str, timeout_s: float = AUTHENTICATION_S) -> Channel:
    """The client's end. Raises ConnectionError if nobody listens there, in time, who knows the secret."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
        nonce = await asyncio.wait_for(reader.readexactly(NONCE_BYTES), timeout_s)
        mine = secrets.token_bytes(NONCE_BYTES)
        writer.write(_proof(secret, b"client", nonce) + mine)
        proof = await asyncio.wait_for(reader.readexactly(NONCE_BYTES), timeout_s)
    except (asyncio.IncompleteReadError, asyncio.TimeoutError, OSError) as error:
        raise WireError(f"no controller of this run answers at {host}:{port}") from error
    if not hmac.compare_digest(proof, _proof(secret, b"server", mine)):
        writer.close()
        raise WireError(f"who answers at {host}:{port} does not know the run's secret")
    return Channel(reader, writer)


def accept_blocking(connection: socket.socket, secret: str) -> None:
    """As ``accept``, for a thread. Raises WireError."""
    # Without it an answer in two parts waits for the delayed acknowledgement of the first, 40 ms each time.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    deadline = time.monotonic() + AUTHENTICATION_S
    connection.settimeout(AUTHENTICATION_S)
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(nonce)
    answer = receive_bytes(connection, 2 * NONCE_BYTES, deadline)
    if not hmac.compare_digest(answer[:NONCE_BYTES], _proof(secret, b"client", nonce)):
        raise WireError("the other end does not know the run's secret")
    connection.sendall(_proof(secret, b"server", answer[NONCE_BYTES:]))
    connection.settimeout(None)


def connect_blocking(host: str, port: int, secret: str, timeout_s: float = AUTHENTICATION_S) -> socket.socket:
    """As ``connect``, for a thread; the socket it returns has no time limit. Raises ConnectionError."""
    deadline = time.monotonic() + timeout_s
    connection = socket.create_connection((host, port), timeout_s)
    try:
        nonce = receive_bytes(connection, NONCE_BYTES, deadline)
        mine = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(_proof(secret, b"client", nonce) + mine)
        proof = receive_bytes(connection, NONCE_BYTES, deadline)
        if not hmac.compare_digest(proof, _proof(secret, b"server", mine)):
            raise WireError(f"who answers at {host}:{port} does not know the run's secret")
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive_bytes(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """Exactly ``size`` bytes. Raises WireError if the connection ends before."""
    data = bytearray(size)
    receive_into(connection, memoryview(data), deadline)
    return bytes(data)


def receive_into(connection: socket.socket, view: memoryview, deadline: float | None = None) -> None:
    """Fills ``view``. Raises WireError if the connection ends before, or TimeoutError when ``deadline``, a time of the
    monotonic clock, has passed, however the bytes drip."""
    while view:
        if deadline is not None:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                raise TimeoutError("the other end did not authenticate in time")
        got = connection.recv_into(view)
        if not got:
            raise WireError("the connection ended in the middle of a message")
        view = view[got:]


def receive(connection: socket.socket) -> Message | None:
    """Next message of a blocking socket; None when the other end has closed."""
    try:
        header = receive_bytes(connection, LENGTH.size)
    except WireError:
        return None
    return json.loads(receive_bytes(connection, _length(header)))


def send(connection: socket.socket, message: Message) -> None:
    """Sends one message on a blocking socket."""
    connection.sendall(encode(message))
