"""Attention's benchmark: shapes of real models, peers, FLOPs, and the configurations to compile ahead of time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.aot import AotCase
from llm_kernels.attention.tiles import Case, dkdv_tile, dq_tile, forward_tile
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded

# Time limit for the proof that the Gluon kernel is right on this GPU; most of it is compilation.
PROOF_S = 30
_HEADS = [
    *sharded(lambda llama, tp: {"heads": llama.heads // tp, "groups": llama.groups // tp, "d": 128}),
    {"name": "d64", "heads": 32, "groups": 32, "d": 64},
]


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    s, b, h, g, d = (shape[name] for name in ("tokens", "batch", "heads", "groups", "d"))
    return tuple(normal(s, b, heads, d, dtype=dtype, device=device) for heads in (h, g, g))


def _flops(shape: Shape) -> Work:
    """FLOPs of the products over visible pairs: 2 products forward and 5 backward (our two backward kernels do 7)."""
    s = shape["tokens"]
    pairs = s * (s + 1) // 2 if shape["causal"] else s * s
    product = 2 * pairs * shape["batch"] * shape["heads"] * shape["d"]
    return Work(2 * product, 5 * product)


def _ours() -> Callable[..., Any]:
    from llm_kernels.attention.op import attention

    return lambda q, k, v: attention(q, k, v, backend="triton")


def _ours_gluon() -> Callable[..., Any]:
    from llm_kernels.attention.op import attention

    fault = gluon_fault()
    if fault:
        raise RuntimeError(fault)
    return lambda q, k, v: attention(q, k, v, backend="gluon")


@cache
def gluon_fault(backend: str = "gluon") -> str | None:
    """What is wrong with the Gluon kernel on this machine, or None. The proof runs in a process of its own, because a
    kernel with a wrong barrier may hang or break every later CUDA call of its process. Another backend rehearses the
    proof without a GPU."""
    command = [sys.executable, "-m", "llm_kernels.attention.bench", backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROOF_S)
    except subprocess.TimeoutExpired:
        return f"not done after {PROOF_S} s"
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1] if done.returncode else None


def _sdpa(name: str | None, repeated: bool = False) -> Callable[[], Callable[..., Any]]:
    """Torch's attention with one of its backends, or (None) with torch's own choice. repeated: first repeats keys and
    values for the heads of their group, for a backend that refuses groups; that copy is part of the time."""

    def provider() -> Callable[..., Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = nullcontext if name is None else partial(sdpa_kernel, getattr(SDPBackend, name))

        def run(q, k, v):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            if repeated:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            with chosen():
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return out.permute(2, 0, 1, 3)

        return run

    return provider


def _flash_attention() -> Callable[..., Any]:
    from flash_attn import flash_attn_func

    def run(q, k, v):
        return flash_attn_func(*(x.transpose(0, 1) for x in (q, k, v)), causal=True).transpose(0, 1)

    return run


def _flash_attention_3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_func

    def run(q, k, v):
        out = flash_attn_func(*(x.transpose(0, 1) for x in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)

    return run


BENCHMARK = Benchmark(
    name="attention",
    shapes=[
        {**shape, "name": f"{shape['name']} causal {tokens}", "tokens": tokens, "batch": 1, "causal": True}
        for tokens in (8192, 4096, 32768)
        for shape in _HEADS
    ],
    small={"name": "small", "tokens": 128, "batch": 1, "heads": 2, "groups": 1, "d": 64, "causal": True},
    make=_make,
    providers={
        "ours": _ours,
        "ours-gluon": _ours_gluon,
        "torch": _sdpa(None),
        "torch cudnn": _sdpa("CUDNN_ATTENTION"),
        "torch cudnn, heads repeated": _sdpa("CUDNN_ATTENTION", repeated=True),
        "torch flash": _sdpa("FLASH_ATTENTION"),
        "flash-attn 2": _flash_attention,
        "flash-attn 3": _flash_attention_3,
    },
    flops=_flops,
)


def _arguments(kernel: Any, d: int, tile: Any, dtype: str, features: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the launchers pass for 8192 tokens of 32 heads in 8 groups, packed as megatron packs them."""
    group, groups, batch = 4, 8, 1
    width = groups * (group + 2) * d
    strides = {"row": width, "batch": width, "group": (group + 2) * d, "head": d}
    known = {
        "H": group * groups, "G": groups, "SQ": 8192, "scale": "fp32", "left": 4096 if features["LEFT"] else 0,
        "right": 0, "softcap": "fp32", "keep_scale": "fp32", "seed": "i64", "threshold": "i32", "GROUP": group, "D": d,
        "BLOCK_D": max(16, 1 << (d - 1).bit_length()), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **features,
    }  # fmt: skip
    arguments: dict[str, Any] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in known:
            arguments[name] = known[name]
        elif name.endswith("_stride"):
            tensor, kind, _ = name.split("_")
            arguments[name] = batch * group * groups * d if tensor in ("out", "dout") else strides[kind]
        else:
            arguments[name] = {"table_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}.get(name, f"*{dtype}")
    return arguments


_PLAIN = {"LEFT": False, "RIGHT": True, "SOFTCAP": 0, "DROPOUT": False}
_FEATURES = {
    "causal": _PLAIN,
    "full": {**_PLAIN, "RIGHT": False},
    "window": {**_PLAIN, "LEFT": True},
    "softcap": {**_PLAIN, "SOFTCAP": 1},
    "dropout": {**_PLAIN, "DROPOUT": True},
}


# Head dim, and whether causal: a causal kernel has the loop of a full one and one more.
_GLUON_CASES = [(64, True), (128, True), (128, False), (256, True)]


def aot_cases(arch: int) -> list[AotCase]:
    """Forward, dk and dv, dq: every head dim causal, every feature at 128, fp32 at 64 and 128; and delta."""
    from llm_kernels.attention import kernel, kernel_backward, kernel_delta

    kinds = [
        ("forward", kernel._attention_fwd_kernel, forward_tile),
        ("dk dv", kernel_backward._attention_bwd_dkdv_kernel, dkdv_tile),
        ("dq", kernel_backward._attention_bwd_dq_kernel, dq_tile),
    ]
    variants = [(d, "bf16", "causal") for d in (64, 96, 128, 256)]
    variants += [(128, "bf16", name) for name in _FEATURES if name != "causal"]
    variants += [(256, "bf16", "softcap"), (64, "fp32", "causal"), (128, "fp32", "causal")]
    cases = []
    for kind, function, tile_of in kinds:
        for d, dtype, feature in variants:
            features = _FEATURES[feature]
            softcap, dropout, causal = features["SOFTCAP"] > 0, bool(features["DROPOUT"]), bool(features["RIGHT"])
            tile = tile_of(Case(arch, d, 4 if dtype == "fp32" else 2, softcap, dropout, causal))
            wants = frozenset({"any_tensor_core" if d > 128 and kind == "dk dv" else "tensor_core"})
            wants = wants if dtype == "bf16" else frozenset()
            arguments = _arguments(function, d, tile, dtype, features)
            name = f"attention {kind} d={d} {feature} {dtype}"
            cases.append(AotCase(name, function, arguments, tile.num_warps, tile.num_stages, wants))
    arguments = {
        "out_ptr": "*bf16", "dout_ptr": "*bf16", "lse_ptr": "*fp32", "dlse_ptr": None, "delta_ptr": "*fp32",
        "lse2_ptr": "*fp32", "row_stride": 32 * 128, "S": 8192, "D": 128, "BLOCK_D": 128, "BLOCK_S": 64,
        "HAS_DLSE": False,
    }  # fmt: skip
    per_row = kernel_delta._per_row_kernel
    cases.append(AotCase("attention per row d=128", per_row, arguments, wants=frozenset({"wide"})))
    return cases + (_gluon_cases() if arch == 90 else [])


def _gluon_arguments(blocks: dict[str, int], d: int, dtype: str) -> dict[str, Any]:
    """The arguments that the Gluon launchers pass: descriptors with ``blocks`` rows a tile, and the columns of the
    heads in the packed projection."""
    from llm_kernels.attention.gluon_forward import shared_layout

    descriptors = {
        f"{name}_desc": f"tensordesc<{dtype}[{n}, {d}],{shared_layout(n, d)!r}>" for name, n in blocks.items()
    }
    places = {f"{x}_{of}_col": size for x in "qkv" for of, size in (("batch", 48 * d), ("group", 6 * d))}
    scalars = dict.fromkeys(("H", "G", "SQ", "columns", "section", "row_tiles", "turns"), "i32")
    return {**descriptors, **places, **scalars, "q_head_col": d, "scale": "fp32", "table_ptr": "*i32"}


def _gluon_backward_cases() -> list[AotCase]:
    from llm_kernels.attention import gluon_backward, gluon_dkdv, gluon_dq

    cases = []
    for d, causal in _GLUON_CASES[:3]:
        keys = gluon_backward.keys_of_tile(d)
        strides = {"row": 48 * d, "batch": 48 * d, "group": 6 * d, "head": d}
        kinds = [
            ("dk dv", gluon_dkdv._attention_bwd_dkdv_gluon_kernel, 64, ("dk", "dv"), {"STAGES": 2}),
            ("dq", gluon_dq._attention_bwd_dq_gluon_kernel, keys, ("dq",), {"BLOCK_N": keys}),
        ]
        for kind, kernel, block, results, more in kinds:
            blocks = {"q": 64, "k": block, "v": block, "dout": 64}
            arguments = _gluon_arguments(blocks, d, "bf16") | {"GROUP": 4, "D": d, "CAUSAL": causal} | more
            arguments |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", **{f"{name}_ptr": "*bf16" for name in results}}
            arguments |= {f"{name}_{of}_stride": size for name in results for of, size in strides.items()}
            name = f"attention {kind} gluon d={d} {'causal' if causal else 'full'} bf16"
            wants = frozenset({"tensor_core", "specialized"})
            cases.append(AotCase(name, kernel, arguments, 4, 2, wants, gluon=True))
    return cases


def _gluon_cases() -> list[AotCase]:
    """Llama-3 8B's heads packed as megatron does, causal and full, of every head dim, and fp16."""
    from llm_kernels.attention import gluon_forward as gluon

    cases = _gluon_backward_cases()
    for d, causal, dtype in [(*case, "bf16") for case in _GLUON_CASES] + [(128, True, "fp16")]:
        settings = gluon.config(d)
        blocks = {"q": gluon.HALF.value, "k": settings.block_n, "v": settings.block_n}
        arguments = {**_gluon_arguments(blocks, d, dtype), **gluon.constants(d, 4, causal)}
        arguments |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "out_row_stride": 32 * d}
        name = f"attention forward gluon d={d} {'causal' if causal else 'full'} {dtype}"
        wants = frozenset({"tensor_core", "specialized"})
        kernel = gluon._attention_fwd_gluon_kernel
        cases.append(AotCase(name, kernel, arguments, 4, settings.stages, wants, gluon=True))
    return cases


def main() -> None:
    """``python -m llm_kernels.attention.bench [BACKEND]`` compares the Gluon kernel with torch's attention on this GPU,
    on a small case and on larger ones with many tiles per program; raises if the kernel is refused or wrong. Another
    backend rehearses this on a CPU, on one small case."""
    from llm_kernels.attention.op import attention
    from llm_kernels.testing import compare, default_device

    backend = sys.argv[1] if len(sys.argv) > 1 else "gluon"
    device = torch.device("cuda") if backend == "gluon" else default_device()
    real = device.type == "cuda"
    for tokens, d in ((200, 64), (1000, 128), (2048, 128), (300, 256)) if real else ((70, 64),):
        shape = {**BENCHMARK.small, "tokens": tokens, "heads": 16 if real else 2, "groups": 4 if real else 1, "d": d}
        torch.manual_seed(0)
        inputs = _make(shape, torch.bfloat16, device)
        peer = _sdpa(None)()
        compare(f"attention {backend}/{tokens}", partial(attention, backend=backend), peer, peer, inputs)


if __name__ == "__main__":
    main()
