"""A Slurm cluster whose nodes are cut off and switched off as real ones are.

Every node has Linux namespaces of its own: network (one end of a cable to a bridge), processes, /dev/shm and host name.
All of them live inside outer namespaces, so nothing of this machine's network is touched, clusters can run beside each
other, and the end of one process is the end of them all.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.slurm import cluster
from tests.slurm.cluster import Cluster, until

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "hostname", "mount")
NETWORK = "10.77.0"
CONTROLLER = f"{NETWORK}.254"
SPACES = ("--net", "--mount", "--pid", "--ipc", "--uts")
# The first process of a namespace has to reap the orphans of all others.
INIT = ["bash", "-c", "while :; do sleep 1 & wait $!; done"]


def why_not() -> str | None:
    """What this machine lacks for a cluster of namespaces."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, util-linux and hostname)"
    reason = cluster.why_not()
    if reason is None and subprocess.run(["unshare", *SPACES, "--fork", "true"], capture_output=True).returncode:
        reason = "the kernel allows no namespaces here"
    if reason is None and subprocess.run(["unshare", "--net", *_BRIDGE], capture_output=True).returncode:
        reason = "the kernel has no network bridges"
    return reason


_BRIDGE = ("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")


class Namespaces(Cluster):
    """Slurm with nodes n1 to n<nodes> at 10.77.0.1 and on; slurmctld, sbatch and all of ``run`` at 10.77.0.254.

    ``cpus``: CPUs of each node, 8 if not given. ``own_name``: the address that a node's /etc/hosts gives for the node
    itself, as Debian's installer writes 127.0.1.1; the nodes' addresses then have no other source than their names."""

    def __init__(self, folder: Path, nodes: int = 4, cpus: Sequence[int] = (), own_name: str | None = None) -> None:
        super().__init__(folder, nodes)
        self.cpus = dict(zip(self.nodes, cpus))
        self.own_name = own_name
        self._makers: list[subprocess.Popen[bytes]] = []
        self._inits: dict[str, psutil.Process] = {}

    def run(self, argv: Sequence[str], timeout_s: float = 30.0, check: bool = True) -> str:
        """Output of a command on the machine of slurmctld."""
        return super().run(self.inside("", argv), timeout_s, check)

    def inside(self, node: str, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` on a node, "" for the machine of slurmctld, in the cluster's folder."""
        target = str(self._inits[node].pid)
        return ["nsenter", "-t", target, *SPACES, "--", "env", "-C", str(self.folder), *argv]

    def processes(self, node: str) -> list[psutil.Process]:
        """What runs on a node, its first process apart."""
        space = f"/proc/{self._inits[node].pid}/ns/net"
        found = self._inits[node].children(recursive=True)
        return [process for process in found if _same(space, f"/proc/{process.pid}/ns/net")]

    def _network(self, *argv: str, check: bool = True) -> None:
        """Runs ``ip`` on the machine of slurmctld, with this machine's process ids."""
        command = ["nsenter", "-t", str(self._inits[""].pid), "--net", "--", "ip", *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")

    def _begin(self, name: str, enter: Sequence[str]) -> None:
        """Makes namespaces inside of those that ``enter`` enters; their first process is then known by ``name``."""
        command = [*enter, "unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", *INIT]
        with (self.folder / "log" / f"namespaces{name}.log").open("a") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._makers.append(process)

        def first() -> list[psutil.Process]:
            return [p for p in psutil.Process(process.pid).children(recursive=True) if p.cmdline() == INIT]

        until(lambda: len(first()) == 1, cluster.UP_S, f"start of the namespaces {name}")
        self._inits[name] = first()[0]

    def up(self) -> None:
        """Starts every daemon and waits until all nodes are idle."""
        self._write_files()
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(self.nodes, 1)}
        for of in ("", *self.nodes):
            own = {of: self.own_name} if of and self.own_name else {}
            lines = [f"{address} {name}" for name, address in {**addresses, **own}.items()]
            text = "\n".join(["127.0.0.1 localhost", f"{CONTROLLER} control", *lines, ""])
            (self.folder / f"hosts{of}").write_text(text)
        self._begin("", ("setpriv", "--pdeathsig", "KILL"))
        for command in (
            ["hostname", "control"],
            ["mount", "--bind", str(self.folder / "hosts"), "/etc/hosts"],
            ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
            ["ip", "link", "set", "lo", "up"],
            list(_BRIDGE),
            ["ip", "address", "add", f"{CONTROLLER}/24", "dev", "br0"],
            ["ip", "link", "set", "br0", "up"],
        ):
            self.run(command)
        self._start_controller()
        for name in self.nodes:
            self._start_node(name)
        self.wait_for_nodes(len(self.nodes), ("idle",))

    def _controller_listens(self) -> bool:
        probe = f"import socket; socket.create_connection(({CONTROLLER!r}, {self.port})).close()"
        return subprocess.run(self.inside("", [sys.executable, "-c", probe]), capture_output=True).returncode == 0

    def _controller(self) -> str:
        return f"control({CONTROLLER})"

    def _node_lines(self, gres: str) -> str:
        address = "" if self.own_name else f"NodeAddr={NETWORK}."
        return f"SlurmctldPort={self.port}\nSlurmdPort={self.port + 1}\n" + "".join(
            f"NodeName={name} {address and f'{address}{number}'} CPUs={self.cpus.get(name, 8)} RealMemory=4000{gres} "
            "State=UNKNOWN\n"
            for number, name in enumerate(self.nodes, 1)
        )

    def _start_node(self, node: str) -> None:
        self._begin(node, self.inside("", ()))
        number = node.removeprefix("n")
        # The kernel takes its time to remove the cable of a node that died.
        self._network("link", "delete", f"v{node}", check=False)
        self._network("link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", self._pid(node))
        self._network("link", "set", f"v{node}", "master", "br0", "up")
        for command in (
            ["hostname", node],
            ["mount", "--bind", str(self.folder / f"hosts{node}"), "/etc/hosts"],
            ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
            ["ip", "link", "set", "lo", "up"],
            ["ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0"],
            ["ip", "link", "set", "eth0", "up"],
            ["slurmd", "-f", str(self.conf), "-N", node],
        ):
            Cluster.run(self, self.inside(node, command))

    def _pid(self, node: str) -> str:
        return str(self._inits[node].pid)

    def crash(self, node: str) -> None:
        """Every process of the node dies at once; the kernel closes their connections."""
        self._inits.pop(node).kill()

    def power_off(self, node: str) -> None:
        """The node and all that it runs is gone without a word to anyone."""
        self.partition(node)
        self.crash(node)

    def partition(self, node: str) -> None:
        """Pulls the node's cable; what runs there goes on."""
        self._network("link", "set", f"v{node}", "down")

    def hide(self, node: str, path: Path) -> None:
        """The node has nothing at ``path``: there lies an empty file system of its own."""
        path.mkdir(parents=True, exist_ok=True)
        Cluster.run(self, self.inside(node, ["mount", "-t", "tmpfs", "tmpfs", str(path)]))

    def show(self, node: str, path: Path) -> None:
        """What ``hide`` hid is there again."""
        Cluster.run(self, self.inside(node, ["umount", "--lazy", str(path)]))

    def heal(self, node: str) -> None:
        """Puts the cable back."""
        self._network("link", "set", f"v{node}", "up")

    def down(self) -> None:
        """Ends every process of the cluster."""
        inside = [child for init in self._inits.values() for child in (init, *init.children(recursive=True))]
        if "" in self._inits:
            self._inits[""].kill()
        for maker in self._makers:
            maker.wait(10)
        psutil.wait_procs(inside, timeout=10)
        self._makers, self._inits = [], {}


def _same(first: str, second: str) -> bool:
    try:
        return Path(first).readlink() == Path(second).readlink()
    except OSError:  # it has ended
        return False
