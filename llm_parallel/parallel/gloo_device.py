"""One gloo device for all process groups of a process.

torch opens a device for every group: a listening socket, and a thread that wakes a hundred times a second, so that
freeing the group waits up to 10 ms for it. A layout has a dozen groups, and a recovery frees and opens them all.
"""

from __future__ import annotations

import datetime
import functools
from typing import Any

from torch.distributed import HashStore, distributed_c10d

_Gloo: Any = distributed_c10d.ProcessGroupGloo


@functools.cache
def _as_torch_opens_them() -> Any:
    """Options that torch chooses, taken from a group of this process alone: devices on the interfaces that
    GLOO_SOCKET_IFNAME names, else on the interface of the host's name, and the number of their threads."""
    return _Gloo(HashStore(), 0, 1, datetime.timedelta(seconds=1)).options


class _OnOneDevice(_Gloo):
    """torch's gloo backend on the process's device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta, **newer: Any) -> None:
        """newer: arguments that later versions of torch pass, each named like an option (2.14: enable_reconfigure)."""
        first, options = _as_torch_opens_them(), _Gloo._Options()
        options._devices, options._threads, options._timeout = first._devices, first._threads, timeout
        for name, value in newer.items():
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


def share_gloo_device() -> None:
    """Makes torch.distributed create all later gloo groups on one device. A second call changes nothing."""
    distributed_c10d.ProcessGroupGloo = _OnOneDevice
