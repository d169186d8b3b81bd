"""Messages between controller, agents and workers: JSON objects with their length in front, over authenticated sockets.

Both ends of a TCP connection prove that they hold the run's secret (HMAC-SHA256 of the other's fresh random number,
and of who they are) before anything else is read; a message is at most ``MAX_BYTES`` long and never unpickled. After
that every message has a code of its own, made of its place in the connection, its direction and its content with a key
that only this connection has: one that was changed, left out, repeated or put in on the way ends the connection. What
is said can be read on the way; it is not encrypted. The numbers of a memory copy follow their message without a code.
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
CODE_BYTES = 16
NUMBER = struct.Struct("!Q")
AUTHENTICATION_S = 5.0

Message = dict[str, Any]


class WireError(ConnectionError):
    """The other end does not belong to this run, or does not follow the protocol."""


class Seal:
    """Codes of the messages of one connection, in both directions."""

    def __init__(self, secret: str, nonces: bytes, is_server: bool) -> None:
        """nonces: the server's random number, then the client's."""
        keys = [hmac.new(secret.encode(), b"session" + way + nonces, hashlib.sha256).digest() for way in (b"s", b"c")]
        self._mine, self._theirs = keys if is_server else keys[::-1]
        self._sent = self._received = 0

    def code(self, data: bytes) -> bytes:
        """Of the next message to send."""
        self._sent += 1
        return _code(self._mine, self._sent, data)

    def check(self, code: bytes, data: bytes) -> None:
        """Raises WireError if this is not the next message of the other end."""
        self._received += 1
        if not hmac.compare_digest(code, _code(self._theirs, self._received, data)):
            raise WireError("a message was changed, left out or put in on the way; the connection is given up")


def _code(key: bytes, number: int, data: bytes) -> bytes:
    return hmac.new(key, NUMBER.pack(number) + data, hashlib.sha256).digest()[:CODE_BYTES]


class SealedSocket(socket.socket):
    """A blocking connection whose messages have codes."""

    seal: Seal

    @classmethod
    def of(cls, connection: socket.socket, seal: Seal) -> SealedSocket:
        """Takes over an authenticated connection."""
        limit = connection.gettimeout()
        found = cls(fileno=connection.detach())
        found.settimeout(limit)
        found.seal = seal
        return found


def encode(message: Message, seal: Seal | None = None) -> bytes:
    """A message as it goes over the wire."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(data)) + (seal.code(data) if seal is not None else b"") + data


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
    """One connection of an asyncio program: an authenticated one with a seal, or one between a process and its parent,
    which no other can reach."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seal: Seal | None = None) -> None:
        self._reader, self._writer, self._seal = reader, writer, seal

    async def receive(self) -> Message | None:
        """Next message; None when the other end has closed. Raises ConnectionError if it broke."""
        try:
            size = _length(await self._reader.readexactly(LENGTH.size))
            code = await self._reader.readexactly(CODE_BYTES) if self._seal is not None else b""
            data = await self._reader.readexactly(size)
            if self._seal is not None:
                self._seal.check(code, data)
            return json.loads(data)
        except asyncio.IncompleteReadError:
            return None

    def send(self, message: Message) -> None:
        """Hands a message to the system; what cannot be delivered is lost with the connection."""
        if not self._writer.is_closing():
            self._writer.write(encode(message, self._seal))

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
    return Channel(reader, writer, Seal(secret, nonce + answer[NONCE_BYTES:], is_server=True))


async def connect(
    host: str, port: int, secret: str, timeout_s: float = AUTHENTICATION_S, queued_s: float = AUTHENTICATION_S
) -> Channel:
    """The client's end. Raises ConnectionError if nobody listens there, in time, who knows the secret. queued_s: time
    that a server may take for those who came before."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
        nonce = await asyncio.wait_for(reader.readexactly(NONCE_BYTES), queued_s)
        mine = secrets.token_bytes(NONCE_BYTES)
        writer.write(_proof(secret, b"client", nonce) + mine)
        proof = await asyncio.wait_for(reader.readexactly(NONCE_BYTES), timeout_s)
    except (asyncio.IncompleteReadError, asyncio.TimeoutError, OSError) as error:
        raise WireError(f"no controller of this run answers at {host}:{port}") from error
    if not hmac.compare_digest(proof, _proof(secret, b"server", mine)):
        writer.close()
        raise WireError(f"who answers at {host}:{port} does not know the run's secret")
    return Channel(reader, writer, Seal(secret, nonce + mine, is_server=False))


def accept_blocking(connection: socket.socket, secret: str) -> SealedSocket:
    """As ``accept``, for a thread: the connection as it is used from then on. Raises WireError."""
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
    return SealedSocket.of(connection, Seal(secret, nonce + answer[NONCE_BYTES:], is_server=True))


def connect_blocking(host: str, port: int, secret: str, timeout_s: float = AUTHENTICATION_S) -> SealedSocket:
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
    return SealedSocket.of(connection, Seal(secret, nonce + mine, is_server=False))


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
    size = _length(header)
    if not isinstance(connection, SealedSocket):
        return json.loads(receive_bytes(connection, size))
    code = receive_bytes(connection, CODE_BYTES)
    data = receive_bytes(connection, size)
    connection.seal.check(code, data)
    return json.loads(data)


def send(connection: socket.socket, message: Message) -> None:
    """Sends one message on a blocking socket."""
    connection.sendall(encode(message, connection.seal if isinstance(connection, SealedSocket) else None))
