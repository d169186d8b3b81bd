"""Folders that last as long as the process, for what is made once and read later; tests of one kind take tmp_path."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file that holds nothing, for tests that end before weights are read."""
_KEPT: list[TemporaryDirectory[str]] = []


def lasting_folder() -> Path:
    """A new folder that is removed when this process ends."""
    _KEPT.append(TemporaryDirectory())
    return Path(_KEPT[-1].name)
