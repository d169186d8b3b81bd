"""Another user of the machine asks a server on loopback, with a real process of another user."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_parallel.serve import local_users
from llm_parallel.serve.local_users import is_ours, owner
from tests.launch.test_private import STRANGER, needs_root

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux lists connections")


@pytest.fixture(params=["127.0.0.1", "::1", "mapped"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A server on loopback; also one of IPv6 that clients of IPv4 reach."""
    host = "::" if request.param == "mapped" else request.param
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.create_server((host, 0), family=family, dualstack_ipv6=request.param == "mapped")
    except (OSError, ValueError) as error:
        pytest.skip(f"this machine has no {request.param}: {error}")
    with found:
        yield found


class Caller:
    """A process of a user that has connected, and our end of the connection."""

    def __init__(self, user: int, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        waiting, self._end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:  # a stranger may not be able to read the tests' Python, so nothing is executed anew
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                os.close(self._end)
                with socket.create_connection(("127.0.0.1" if host == "::" else host, port)) as client:
                    client.sendall(b"x")
                    os.read(waiting, 1)
            finally:
                os._exit(0)
        os.close(waiting)
        self.connection, _ = listener.accept()
        assert self.connection.recv(1) == b"x"
        self.ends = self.connection.getpeername()[:2], self.connection.getsockname()[:2]

    def leave(self) -> None:
        """Ends the process, and sees that it has."""
        os.close(self._end)
        os.waitpid(self._pid, 0)
        assert self.connection.recv(1) == b""


@needs_root
@pytest.mark.processes
def test_whose_process_has_connected(listener: socket.socket) -> None:
    """This user's and a stranger's; one that has gone is nobody's, though the system's table then says user 0."""
    for user in (0, STRANGER):
        caller = Caller(user, listener)
        with caller.connection:
            try:
                assert owner(*caller.ends) == user and is_ours(*caller.ends) == (user == 0)
            finally:
                caller.leave()
            assert owner(*caller.ends) is None and not is_ours(*caller.ends)


@needs_root
@pytest.mark.processes
def test_a_stranger_is_refused_and_may_ask_for_health(listener: socket.socket) -> None:
    pytest.importorskip("starlette")
    from llm_parallel.serve.errors import ApiError
    from llm_parallel.serve.guard import Access

    caller, access = Caller(STRANGER, listener), Access(own_user=True)
    scope = {"type": "http", "headers": [], "client": caller.ends[0], "server": caller.ends[1]}
    with caller.connection:
        try:
            for path in ("/api/next", "/api/judge", "/v1/chat/completions", "/v1/models"):
                with pytest.raises(ApiError, match="answers the user who started it alone"):
                    access.check_scope({**scope, "path": path})
                Access().check_scope({**scope, "path": path})
            for path in ("/", "/health", "/metrics"):
                access.check_scope({**scope, "path": path})
            with pytest.raises(ApiError):
                access.check_scope({**scope, "path": "/v1/models", "client": None})
        finally:
            caller.leave()


def test_where_the_system_does_not_say_everyone_here_may_ask(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not is_ours(("127.0.0.1", 1), listener.getsockname()[:2]) and not is_ours(("testclient", 1), ("x", 1))
    monkeypatch.setattr(local_users, "TABLES", (tmp_path / "none",))
    assert is_ours(("127.0.0.1", 1), listener.getsockname()[:2])
