"""What the CPU platform replaces in megatron-core, and that the names it replaces still exist."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from llm_parallel.errors import UserError
from llm_parallel.parallel.platform import _gather_and_scatter_users, resolve_device


def test_answered_names_exist_in_megatron_core() -> None:
    for name in (
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
        "_CUDA_RNG_STATE_TRACKER",
        "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        "CudaRNGStatesTracker",
        "_MODEL_PARALLEL_RNG_TRACKER_NAME",
    ):
        assert hasattr(megatron_random, name), name


def test_modules_that_gather_and_scatter_take_the_functions_from_where_they_are_replaced() -> None:
    users = _gather_and_scatter_users()
    assert len(users) == 3
    assert all(callable(user.dist_all_gather_func) and callable(user.dist_reduce_scatter_func) for user in users)


def test_cuda_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert resolve_device("auto") == "cuda"
    else:
        assert resolve_device("auto") == "cpu"
        with pytest.raises(UserError, match="device is cuda"):
            resolve_device("cuda")


@pytest.mark.processes
def test_importing_the_platform_changes_nothing() -> None:
    code = (
        "import torch; before = torch.cuda.current_device; import llm_parallel.parallel.platform;"
        "assert torch.cuda.current_device is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
