"""A process that joins another one's control group of memory and takes memory until the kernel has ended that one.

python -m tests.slurm.memory_hog PID
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.slurm.cluster import GROUPS

BLOCK_BYTES = 4 << 20
MOST_BYTES = 4 << 30


def main(pid: int) -> None:
    """Raises MemoryError if so much memory ends nobody."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # the kernel takes this one first
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    group = next(line.split(":", 2)[2] for line in lines if line.split(":", 2)[1] == "memory")
    (GROUPS / "memory" / group.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while _lives(pid):
        taken.append(b"x" * BLOCK_BYTES)
        if len(taken) * BLOCK_BYTES > MOST_BYTES:
            raise MemoryError(f"{MOST_BYTES} bytes beside process {pid} have not ended it")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]))
