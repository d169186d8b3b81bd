"""What `ncu --csv` is in a rehearsal: runs the command that it is given and prints a profile of the form that Nsight
Compute documents for its details page, with made-up numbers."""

from __future__ import annotations

import subprocess
import sys

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
OPTIONS_WITH_VALUE = ("--clock-control", "--metrics", "--kernel-name", "--launch-count")


def main() -> int:
    """Exit status of the command."""
    arguments, metrics = sys.argv[1:], ""
    while arguments[0].startswith("--"):
        if arguments[0] == "--metrics":
            metrics = arguments[1]
        del arguments[: 2 if arguments[0] in OPTIONS_WITH_VALUE else 1]
    print("==PROF== Connected to process 1")
    done = subprocess.run(arguments)
    print("==PROF== Disconnected from process 1")
    print(HEAD)
    for number, kernel in enumerate(("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel")):
        about = f'"{number}","1","python3","host","{kernel}","1","7","(128, 1, 1)","(264, 1, 1)","0","9.0"'
        for metric in metrics.split(","):
            print(f'{about},"Command line profiler metrics","{metric}","unit","1,234.5"')
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
