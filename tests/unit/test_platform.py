"""What the CPU platform answers for megatron-core, and that the names it answers still exist."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from llm_parallel.errors import UserError
from llm_parallel.parallel.platform import open_platform, resolve_device
from tests.harness import run_ranks


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


def test_cuda_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert resolve_device("auto") == "cuda"
    else:
        assert resolve_device("auto") == "cpu"
        with pytest.raises(UserError, match="device is cuda"):
            resolve_device("cuda")


def forked_streams(rank: int, world_size: int) -> tuple[list[float], list[float], list[float]]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout

    open_groups(Layout(tp=world_size), rank, open_platform("cpu"), seed=7)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    assert torch.equal(torch.get_rng_state(), before), "the outer stream is where it was"
    with get_cuda_rng_tracker().fork():
        later = torch.rand(3).tolist()
    return torch.rand(3).tolist(), inside, later


def test_rng_streams_differ_over_tensor_parallel_ranks_and_go_on() -> None:
    first, second = run_ranks(forked_streams, 2)
    assert first[0] == second[0], "outside a fork all ranks draw alike"
    assert first[1] != second[1]
    assert first[1] != first[2]


def literals(rank: int, world_size: int) -> tuple[str, str]:
    open_platform("cpu")
    names = {"__name__": "megatron.somewhere", "torch": torch}
    exec("inside = str(torch.zeros(1, device='cuda').cuda().device)", names)
    try:
        outside = str(torch.zeros(1, device="cuda").device)
    except (RuntimeError, AssertionError) as error:
        outside = type(error).__name__
    return names["inside"], outside  # type: ignore[return-value]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device that is not there")
def test_only_megatrons_literals_are_mapped() -> None:
    inside, outside = run_ranks(literals, 1)[0]
    assert inside == "cpu"
    assert outside != "cpu"


def test_importing_the_platform_changes_nothing() -> None:
    code = (
        "import torch; before = torch.cuda.current_device; import llm_parallel.parallel.platform;"
        "assert torch.cuda.current_device is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
