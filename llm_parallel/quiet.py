"""Silences what libraries print at import about optional packages that are missing."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Hides megatron-core's and torch's warnings about missing optional packages and their own deprecations."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    # torch sets the level of its own logger when it is imported, but not of those below it. The last one would warn
    # once per process on a machine that has the CUDA toolkit and no GPU.
    for name in ("megatron", "torch", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
