"""What launchers ask of a device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def arch(x: Tensor) -> int:
    """Compute capability of the tensor's GPU as a number (80 for A100, 90 for H100); 80 under the interpreter."""
    return _properties(x.device.index or 0)[0] if x.is_cuda else 80


def num_sms(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 4 under the interpreter, where programs run one by one."""
    return _properties(x.device.index or 0)[1] if x.is_cuda else 4
