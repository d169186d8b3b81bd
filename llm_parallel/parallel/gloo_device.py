"""One gloo device for all process groups of a process.

torch opens a device for every group: a listening socket, and a thread that wakes a hundred times a second and for which
whoever frees the group waits up to 10 ms. A layout has a dozen groups, and a recovery frees and opens them all.
"""

from __future__ import annotations

import datetime
import functools
import os
from typing import Any

from torch.distributed import distributed_c10d

_Gloo: Any = distributed_c10d.ProcessGroupGloo
THREADS_PER_DEVICE = 2
"""As torch's own constructor has it."""


@functools.cache
def _devices() -> list[Any]:
    """On the interfaces that GLOO_SOCKET_IFNAME names, as torch reads it, else on the host's name."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if names:
        return [_Gloo.create_device(interface=name) for name in names.split(",")]
    return [_Gloo.create_default_device()]


class _OnOneDevice(_Gloo):
    """torch's gloo backend on the process's device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        options = _Gloo._Options()
        options._devices, options._timeout = _devices(), timeout
        options._threads = THREADS_PER_DEVICE * len(options._devices)
        super().__init__(store, rank, size, options)


def share_gloo_device() -> None:
    """From now on torch.distributed makes its gloo groups so. Calling it again changes nothing."""
    distributed_c10d.ProcessGroupGloo = _OnOneDevice
