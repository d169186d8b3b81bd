"""Where the store of a plain run on one machine listens."""

from __future__ import annotations

import socket
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from llm_launch.local import ON_LOOPBACK, _held_port
from llm_launch.network import own_address
from llm_parallel.parallel.groups import loopback_store, store_here


def test_the_store_listens_on_loopback_alone() -> None:
    """On the port that the launcher holds for it; torch's own store listens everywhere."""

    def addresses(port: int) -> set[str]:
        found = psutil.Process().net_connections("tcp")
        return {one.laddr.ip for one in found if one.laddr.port == port and one.status == psutil.CONN_LISTEN}

    with _held_port(None) as port:
        ours = loopback_store("127.0.0.1", port, 0, 2)
        other = loopback_store("127.0.0.1", port, 1, 2)
        other.set("key", "value")
        assert ours.get("key") == b"value" and addresses(port) == {"127.0.0.1"}
        del ours, other
    theirs = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    assert addresses(theirs.port) & {"::", "0.0.0.0"}, "this test would see it"


def test_processes_that_the_launcher_started_here_meet_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `serve`, `generate`, `evaluate` and `bench` too, all of which open their groups this way."""
    with _held_port(None) as port:
        for name, value in ((ON_LOOPBACK, "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        assert store_here(0, 1) is None, "a single process needs none"
        store = store_here(0, 2)
        assert isinstance(store, dist.TCPStore)
        found = psutil.Process().net_connections("tcp")
        assert {one.laddr.ip for one in found if one.laddr.port == port and one.status == "LISTEN"} == {"127.0.0.1"}
        del store
    monkeypatch.delenv(ON_LOOPBACK)
    assert store_here(0, 2) is None, "torchrun and srun have a rendezvous of their own"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_this_nodes_address_on_the_way_to_the_controller(address: str) -> None:
    """Of the controller's family: a host may have no other."""
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"this machine has no {address}: {error.strerror}")
    assert own_address((address, 9)) == address
