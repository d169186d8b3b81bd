"""CUDA with NCCL, or CPU with gloo: the only file that asks which.

megatron-core 0.16 to 0.19 names CUDA in about sixty places of its training path. On a CPU ``_install_on_cpu`` makes
those places, and nothing else, use the CPU; on CUDA nothing is changed. Each replacement names what it replaces;
``tests/unit/test_platform.py`` asserts that the names still exist.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode

from llm_parallel.errors import UserError
from llm_parallel.parallel import cpu_products
from llm_parallel.parallel.gloo_device import share_gloo_device
from llm_parallel.parallel.scatter import all_gather, reduce_scatter

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Platform:
    """The kind of device of this run and what follows from it."""

    kind: str
    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        """Whether training runs on GPUs."""
        return self.kind == "cuda"

    @property
    def device_name(self) -> str:
        """Name of the chip that measurements are taken on."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        return "CPU"

    def synchronize(self) -> None:
        """Waits until the device has done all that was given to it."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def memory_gib(self) -> tuple[float, float]:
        """Peak bytes allocated and reserved on the GPU, in GiB; on CPU the resident set of this process, twice."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        resident = psutil.Process().memory_info().rss / 2**30
        return resident, resident

    def free_bytes(self) -> int:
        """Memory that is free: on the GPU, or on a CPU in this machine."""
        if self.is_cuda:
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available

    def return_freed_memory(self) -> None:
        """Gives freed memory back to the system where the work that follows has tensors of other sizes than the work
        before. On a CPU glibc keeps freed memory (``_keep_freed_memory``), and what large tensors do not fit into is
        held for ever beside the room that they take anew; torch's allocator on GPUs gives such blocks back by itself
        before it fails."""
        if not self.is_cuda:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)


def resolve_device(choice: str) -> str:
    """``cpu`` or ``cuda`` for ``device=auto|cpu|cuda``. Raises UserError if CUDA is asked for and absent."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees no GPU; use device=cpu or device=auto")
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return choice


def open_platform(choice: str, local_rank: int = 0, threads: int | None = None) -> Platform:
    """Takes the device of ``local_rank`` and makes megatron-core run on it. Call once, before building anything."""
    kind = resolve_device(choice)
    if kind == "cpu":
        _let_writers_finish()
    share_gloo_device()
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "start as many processes per machine as it has GPUs"
            )
        torch.cuda.set_device(local_rank)
        return Platform("cuda", torch.device("cuda", local_rank), "nccl")
    if threads:
        torch.set_num_threads(threads)
    _install_on_cpu()
    return Platform("cpu", CPU, "gloo")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _called_from_megatron() -> bool:
    # Two frames up: __torch_function__, then the caller of the torch function.
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """Maps ``device="cuda"``, ``pin_memory=True``, ``.cuda()`` and ``.type()`` to CPU when megatron-core asks.

    Costs about 5 microseconds a call on CPU. Thread-local, and not active inside ``Tensor.backward``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")) and _called_from_megatron():
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory") and _called_from_megatron():
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda and _called_from_megatron():
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _called_from_megatron():
            # clip_grads and the optimizers compare with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _NullStream:
    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...


def _cpu_rng_tracker(random_module: Any) -> Any:
    """megatron-core's CUDA RNG tracker on the default CPU generator (dropout and recompute under TP)."""

    class CpuRngTracker(random_module.CudaRNGStatesTracker):
        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            assert name not in self.states_, f"RNG state {name} exists"
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random_module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            outside_name = self._current_state_name
            if outside_name != "default-rng":
                self.states_[outside_name] = outside
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_[outside_name] if outside_name != "default-rng" else outside)
                self._current_state_name = outside_name

    return CpuRngTracker()


def _keep_freed_memory() -> None:
    """Tells glibc not to give freed tensors back to the system: fresh pages fault on first touch, 4 % of a step of a
    17 M parameter model on two cores (benchmarks/step.py)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def _let_writers_finish() -> None:
    """Asks Linux that a thread of this process which wakes up does not take the core from one that runs (SCHED_BATCH).

    gloo holds a connection's lock while it writes, and its event loop asks again and again, without a pause, while it
    cannot get that lock. Where a write wakes another process's loop on the same core, the writer waits with the lock
    held for as long as a time slice, and its own loop uses a core meanwhile. Threads inherit this, so it is called
    before gloo makes one. benchmarks/cpu_messages.py measures it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, or one that does not allow it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _gather_and_scatter_users() -> list[Any]:
    """Modules of megatron-core that gather, and that reduce and scatter: for replicas and sequence-parallel layers."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings

    return [param_and_grad_buffer, layers, mappings]


_installed: list[_CudaLiteralsOnCpu] = []


def _install_on_cpu() -> None:
    if _installed:
        return
    _keep_freed_memory()
    cpu_products.install()
    import torch._dynamo

    # megatron's @jit_fuser is torch.compile, which would run a C++ compiler at the first step.
    torch._dynamo.config.disable = True
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_stream = lambda *_, **__: _NullStream()
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random._CUDA_RNG_STATE_TRACKER = _cpu_rng_tracker(megatron_random)
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    for user in _gather_and_scatter_users():
        user.dist_all_gather_func, user.dist_reduce_scatter_func = all_gather, reduce_scatter
    mode = _CudaLiteralsOnCpu()
    mode.__enter__()
    _installed.append(mode)


def seed_everything(seed: int) -> None:
    """Seeds torch and megatron-core's tensor-parallel generators. Process groups must exist."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def set_deterministic() -> None:
    """Bitwise repeatable kernels; cuBLAS needs CUBLAS_WORKSPACE_CONFIG, which the launcher sets."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
