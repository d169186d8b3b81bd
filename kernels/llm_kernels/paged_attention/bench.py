"""Paged attention: decoding batches of real models, peers, least bytes, and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded
from llm_kernels.paged_attention.tiles import Heads, Tile, large_tile, small_tile

PAGE = 16
# Requests and keys of each: one long text, a batch of usual length, and many short ones.
_BATCHES = ((16, 4096), (1, 32768), (128, 1024))


def _lengths(shape: Shape) -> list[int]:
    """Keys of each request: on average ``keys``, from half of them to one and a half."""
    count, keys = shape["requests"], shape["keys"]
    return [keys if count == 1 else keys // 2 + keys * number // (count - 1) for number in range(count)]


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, the cache, the lengths, and the pages of each request in random order, as they are after a while of use."""
    lengths, groups, d = _lengths(shape), shape["groups"], shape["d"]
    needed = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    pages = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for row, of in zip(pages, order.split(needed)):
        row[: len(of)] = of
    q = normal(len(lengths), shape["heads"], d, dtype=dtype, device=device, gradient=False)
    k, v = (normal(len(order) * PAGE, groups, d, dtype=dtype, device=device, gradient=False) for _ in range(2))
    return q, k, v, torch.tensor(lengths, dtype=torch.int32), pages


def _bytes_moved(shape: Shape, dtype: torch.dtype) -> Work:
    """Keys and values of every request, q, out, and the numbers of the pages."""
    lengths, e = _lengths(shape), dtype.itemsize
    cache = 2 * sum(lengths) * shape["groups"] * shape["d"] * e
    rows = 2 * len(lengths) * shape["heads"] * shape["d"] * e
    return Work(cache + rows + 4 * sum(-(-length // PAGE) for length in lengths), 0)


def _planned(make: Callable[[list[int], Tensor, Tensor, Tensor], Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """A provider that makes a plan once for its inputs: generation makes one for all layers of a pass."""
    known: list[Any] = []

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor) -> Tensor:
        if not known or known[0] is not pages:
            known[:] = [pages, make(lengths.tolist(), pages, q, k)]
        return run(q, k, v, known[1])

    return call


def _ours() -> Callable[..., Any]:
    from llm_kernels.paged_attention.op import heads_of, paged_attention
    from llm_kernels.paged_attention.plan import Plan

    def make(lengths: list[int], pages: Tensor, q: Tensor, k: Tensor) -> Plan:
        return Plan.make([1] * len(lengths), lengths, pages.numpy(), PAGE, heads_of(q, k), q.device)

    return _planned(make, lambda q, k, v, plan: paged_attention(q, k, v, plan, backend="triton"))


def _torch() -> Callable[..., Any]:
    """Each request's keys gathered, and torch's attention over them."""

    def make(lengths: list[int], pages: Tensor, q: Tensor, k: Tensor) -> list[Tensor]:
        at = [torch.arange(length) for length in lengths]
        return [(of[x // PAGE].long() * PAGE + x % PAGE).to(q.device) for x, of in zip(at, pages)]

    def run(q: Tensor, k: Tensor, v: Tensor, slots: list[Tensor]) -> Tensor:
        found = []
        for number, of in enumerate(slots):
            keys, values = (x.index_select(0, of).transpose(0, 1).unsqueeze(0) for x in (k, v))
            one = q[number].view(1, k.shape[1], -1, q.shape[-1])  # the heads of a group are queries of the same keys
            found.append(F.scaled_dot_product_attention(one, keys, values).reshape(1, q.shape[1], -1))
        return torch.cat(found)

    return _planned(make, run)


def _flash_attention_3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_with_kvcache

    def make(lengths: list[int], pages: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(lengths, dtype=torch.int32, device=q.device), pages.to(q.device)

    def run(q: Tensor, k: Tensor, v: Tensor, plan: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = (x.view(-1, PAGE, *x.shape[1:]) for x in (k, v))
        lengths, table = plan
        out = flash_attn_with_kvcache(
            q.unsqueeze(1), keys, values, cache_seqlens=lengths, page_table=table, causal=True
        )
        return (out[0] if isinstance(out, tuple) else out).squeeze(1)

    return _planned(make, run)


def _flashinfer() -> Callable[..., Any]:
    import flashinfer

    def make(lengths: list[int], pages: Tensor, q: Tensor, k: Tensor) -> Any:
        needed = [-(-length // PAGE) for length in lengths]
        indices = torch.cat([of[:number] for of, number in zip(pages, needed)])
        indptr = torch.tensor([0, *needed]).cumsum(0)
        last = torch.tensor([length - (number - 1) * PAGE for length, number in zip(lengths, needed)])
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        tables = (x.to(q.device, torch.int32) for x in (indptr, indices, last))
        wrapper.plan(*tables, q.shape[1], k.shape[1], q.shape[2], PAGE, q_data_type=q.dtype, kv_data_type=k.dtype)
        return wrapper

    def run(q: Tensor, k: Tensor, v: Tensor, wrapper: Any) -> Tensor:
        return wrapper.run(q, tuple(x.view(-1, PAGE, *x.shape[1:]) for x in (k, v)))

    return _planned(make, run)


BENCHMARK = Benchmark(
    name="paged_attention",
    shapes=[
        {**shape, "name": f"{shape['name']} {requests} x {keys}", "requests": requests, "keys": keys}
        for requests, keys in _BATCHES
        for shape in sharded(lambda llama, tp: {"heads": llama.heads // tp, "groups": llama.groups // tp, "d": 128})
    ],
    small={"name": "small", "requests": 2, "keys": 768, "heads": 8, "groups": 2, "d": 64},
    make=_make,
    providers={
        "ours": _ours,
        "torch": _torch,
        "flash-attn 3": _flash_attention_3,
        "flashinfer": _flashinfer,
    },
    bytes_moved=_bytes_moved,
    has_backward=False,
)


def _arguments(heads: Heads, tile: Tile, dtype: str, groups: int, left: bool, softcap: float) -> dict[str, Any]:
    """What the launcher passes for queries that are a part of megatron's packed projection."""
    from llm_kernels.paged_attention.kernel import settings

    width = groups * (heads.members + 2) * heads.d
    row = groups * heads.d
    names = ("num_warps", "num_stages")
    fixed = {name: value for name, value in settings(tile, heads, PAGE, left, softcap).items() if name not in names}
    return {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"),
        **dict.fromkeys(("sums_ptr", "stats_ptr"), "*fp32"),
        **dict.fromkeys(("parts_ptr", "pages_ptr", "work_ptr", "merges_ptr"), "*i32"),
        "q_row_stride": width, "q_group_stride": (heads.members + 2) * heads.d, "q_head_stride": heads.d,
        "k_row_stride": row, "k_group_stride": heads.d, "v_row_stride": row, "v_group_stride": heads.d,
        "out_row_stride": groups * heads.members * heads.d, "pages_row_stride": "i32", "groups": groups,
        "rows": "i32", "scale": "fp32", "left": "i32", "softcap": "fp32", **fixed,
    }  # fmt: skip


# (query heads of a group, head dim, dtype, window, soft cap): the presets' heads, then every option.
_CASES = (
    (4, 128, "bf16", False, 0.0), (1, 128, "bf16", False, 0.0), (8, 128, "bf16", False, 0.0),
    (7, 128, "bf16", False, 0.0), (3, 64, "bf16", False, 0.0), (4, 96, "bf16", False, 0.0),
    (2, 256, "bf16", False, 0.0), (20, 64, "bf16", False, 0.0), (20, 128, "bf16", False, 0.0),
    (20, 256, "bf16", False, 0.0), (4, 128, "bf16", True, 0.0), (4, 128, "bf16", False, 50.0),
    (2, 256, "bf16", True, 50.0), (4, 128, "fp32", False, 0.0), (3, 64, "fp32", False, 0.0),
)  # fmt: skip


def aot_cases(arch: int) -> list[AotCase]:
    """Small and large tiles for every kind of heads and options, and the kernel that merges splits."""
    from llm_kernels.paged_attention import kernel

    cases = []
    for members, d, dtype, left, softcap in _CASES:
        heads = Heads(members, d, 4 if dtype == "fp32" else 2, arch)
        feature = "".join((", window" * left, ", softcap" * bool(softcap)))
        for kind, tile in (("small", small_tile(heads)), ("large", large_tile(heads))):
            if kind == "large" and members not in (2, 3, 4):  # nothing else would differ but the number of heads
                continue
            arguments = _arguments(heads, tile, dtype, 8, left, softcap)
            name = f"paged_attention {kind} m={members} d={d}{feature} {dtype}"
            wants = frozenset({"any_tensor_core"} if dtype == "bf16" else ())
            function = kernel._paged_attention_kernel
            cases.append(AotCase(name, function, arguments, tile.num_warps, tile.num_stages, wants))
    for d in (64, 128, 256):
        heads = Heads(4, d, 2, arch)
        arguments = {**_arguments(heads, small_tile(heads), "bf16", 8, False, 0.0), "BLOCK_S": kernel.SPLITS}
        name = f"paged_attention merge d={d} bf16"
        cases.append(AotCase(name, kernel._merge_kernel, arguments, kernel.merge_warps(d)))
    return cases
