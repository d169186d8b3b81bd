"""Silence for what libraries say at import about packages that nobody asked for."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Hides megatron-core's and torch's warnings about missing optional packages and their own deprecations."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in ("megatron", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
