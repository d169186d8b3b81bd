"""Imports megatron-core in two thirds of the time where torch has no CUDA.

``import megatron.core`` decorates functions with ``torch.compile``, which loads the whole compiler though it is
switched off on a CPU (``parallel/platform.py``), and loads wandb if that is installed. That is 3.7 of the 10.3 s of
processor time that a training process needs to begin, and 44 MB (one run each, beside other work). With a CUDA build of
torch nothing is changed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MEGATRON = "megatron.core"


class LeanMegatron(MetaPathFinder):
    """A module finder that is asked before all others until megatron-core is found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual specification of megatron-core, whose module is executed without the compiler; None for other
        modules."""
        if name != MEGATRON:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_lean(module: ModuleType) -> None:
                with without_compiler():
                    execute(module)

            spec.loader.exec_module = execute_lean  # type: ignore[method-assign]
        return spec


@contextmanager
def without_compiler() -> Iterator[None]:
    """While inside, ``torch.compile`` returns its argument unchanged and wandb cannot be imported, if torch was built
    without CUDA. Only the build is asked, not the driver: workers are forked from a process that must not have
    initialized CUDA."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        yield
        return
    compiler, torch.compile = torch.compile, _as_given
    hide_wandb = "wandb" not in sys.modules
    if hide_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
        if hide_wandb:
            del sys.modules["wandb"]


def _as_given(model: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _as_given if model is None else model


def install() -> None:
    """Installs the finder; to be called before anything imports megatron-core."""
    if MEGATRON not in sys.modules and not any(isinstance(finder, LeanMegatron) for finder in sys.meta_path):
        sys.meta_path.insert(0, LeanMegatron())
