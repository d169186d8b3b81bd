"""Silence for what libraries say at import about packages that nobody asked for."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Hides megatron-core's and torch's warnings about missing optional packages and their own deprecations."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    # torch sets its own logger's level when it is imported, but not those below. This one tells a machine that has the
    # CUDA toolkit and no GPU so, once per process.
    for name in ("megatron", "torch", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
