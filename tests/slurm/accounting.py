"""A cluster with accounting: slurmdbd and its database, so that ``sacct``, accounts and qualities of service work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.slurm import cluster
from tests.slurm.cluster import UP_S, Cluster, free_ports, listens, until

PROGRAMS = ("slurmdbd", "mariadbd", "sacct", "sacctmgr")
TRIES = 3
CONFIGURATION = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={storage}
StorageUser=root
StorageLoc=accounting
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""


def why_not() -> str | None:
    """What this machine lacks for a Slurm with accounting."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurmdbd and mariadb-server-core)"
    return cluster.why_not()


class Accounted(Cluster):
    """A cluster whose jobs stay known to ``sacct`` when slurmctld has forgotten them."""

    accounting = "accounting_storage/slurmdbd"

    def __init__(self, folder: Path, nodes: int = 4, gpus: int = 0, more: str = "") -> None:
        super().__init__(folder, nodes, gpus, more)
        self.dbd = free_ports(2)
        self.storage = self.dbd + 1
        self.more += (
            "AccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={self.dbd}\nAccountingStoragePass={folder}/munge.sock\n"
        )

    def _start_controller(self) -> None:
        self._start_munge()
        for attempt in range(TRIES):  # another program may have taken the port meanwhile
            if self._start_database(self.folder / f"database{attempt}"):
                break
            (self.storage,) = free_ports(1)
        else:
            raise RuntimeError(f"the database ended {TRIES} times; see {self.folder}/log/database.log")
        path = self.folder / "slurmdbd.conf"
        path.write_text(CONFIGURATION.format(folder=self.folder, port=self.dbd, storage=self.storage))
        path.chmod(0o600)
        self.run(["slurmdbd"])
        until(lambda: listens(self.dbd), UP_S, "slurmdbd's start")
        self.run(["sacctmgr", "-i", "add", "cluster", "test"], check=False)
        self.start_slurmctld()

    def _start_database(self, data: Path) -> bool:
        """Starts it; False if it has ended instead of listening."""
        data.mkdir()
        # Without tables of rights, since nobody else reaches it and it lives for one test.
        command = ["mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-grant-tables",
                    "--bind-address=127.0.0.1", f"--port={self.storage}", f"--socket={data}/s",
                    f"--pid-file={data}/pid", f"--log-error={self.folder}/log/database.log",
                    "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=16M"]  # fmt: skip
        nowhere = subprocess.DEVNULL
        process = subprocess.Popen(command, env=self.env, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        until(lambda: process.poll() is not None or listens(self.storage), UP_S, "the database's start")
        return process.poll() is None

    def accounts(self, job: str) -> list[str]:
        """State and exit code of each start of a job, by the accounting, the first one first."""
        options = ["-X", "-D", "-n", "-P", "-j", job, "-o", "State,ExitCode"]
        lines = self.run(["sacct", *options]).splitlines()
        return [" ".join([line.split("|")[0].split()[0], line.split("|")[1]]) for line in lines if line]
