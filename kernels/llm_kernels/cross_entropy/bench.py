"""Cross entropy's benchmark: real vocabularies, peers, least bytes, and the configurations to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.aot import AotCase
from llm_kernels.benchmark import Benchmark, Shape, Work, normal, sharded


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    labels = torch.randint(0, shape["vocab_size"], (shape["tokens"],), device=device)
    return normal(shape["tokens"], shape["vocab_size"], dtype=dtype, device=device), labels


def _bytes(shape: Shape, dtype: torch.dtype) -> Work:
    """Least bytes. Besides the logits, forward moves per token the label (8), loss, log-sum-exp, maximum and sum (4
    each); backward moves the label, upstream gradient, maximum and sum."""
    tokens, logits = shape["tokens"], shape["tokens"] * shape["vocab_size"] * dtype.itemsize
    return Work(logits + 24 * tokens, 2 * logits + 20 * tokens)


def _ours() -> Callable[..., Any]:
    from llm_kernels.cross_entropy.op import cross_entropy

    return lambda logits, labels: cross_entropy(logits, labels, backend="triton")


def _torch() -> Callable[..., Any]:
    return lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Liger's forward overwrites the logits by the gradient, so it needs its own copy of them in every run.
    return lambda logits, labels: liger_cross_entropy(logits.clone(), labels, reduction="none")


def _quack() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy

    return lambda logits, labels: cross_entropy(logits, labels, reduction="none")


BENCHMARK = Benchmark(
    name="cross_entropy",
    shapes=[
        *sharded(lambda llama, tp: {"tokens": 8192, "vocab_size": llama.vocab_size // tp}),
        {"name": "llama3, few tokens", "tokens": 64, "vocab_size": 128256},
    ],
    small={"name": "small", "tokens": 32, "vocab_size": 4096},
    make=_make,
    providers={
        "ours": _ours,
        "torch": _torch,
        "torch.compile": lambda: torch.compile(_torch()),
        "liger": _liger,
        "quack": _quack,
    },
    bytes_moved=_bytes,
)


# (columns, size of the vocabulary, dtype). 50,257 (GPT-2) is not a multiple of any vector width, padded or not.
_COMPILED = (
    (128256, 128256, "bf16"),
    (32000, 32000, "bf16"),
    (16032, 16032, "bf16"),
    (1024, 1024, "bf16"),
    (50304, 50257, "bf16"),
    (50257, 50257, "bf16"),
    (128256, 128256, "fp32"),
)


def aot_cases(arch: int, compiled: Sequence[tuple[int, int, str]] = _COMPILED) -> list[AotCase]:
    """Forward (finished by one split, or one of several), backward and the join, for padded and odd vocabularies."""
    from llm_kernels.cross_entropy.kernel import (
        _cross_entropy_bwd_kernel,
        _cross_entropy_fwd_kernel,
        _join_kernel,
    )
    from llm_kernels.cross_entropy.tiles import tile

    terms = {
        "first": "i64", "ignore_index": -100, "labels_ptr": "*i64", "saved_ptr": "*fp32",
        **dict.fromkeys(("label_smoothing", "z_loss", "softcap", "inverse_cap"), "fp32"),
    }  # fmt: skip
    cases = []
    for columns, vocab_size, dtype in compiled:
        lanes, vec, warps = tile(columns, 2 if dtype == "bf16" else 4, columns % 16 == 0, arch)
        wants = frozenset({"wide"}) if columns % 16 == 0 else frozenset()
        shared: dict[str, Any] = {
            **terms, "logits_ptr": f"*{dtype}", "lse_ptr": "*fp32", "V": columns, "M": 8192,
            "row_stride": columns, "num_valid": vocab_size,
        }  # fmt: skip
        variants = [(False, False), (True, False), *([(False, True)] if vocab_size == 128256 else [])]
        for smooth, cap in variants:
            tail = f"V={columns} {dtype}{' smoothed' if smooth else ''}{' capped' if cap else ''}"
            split = -(-columns // (lanes * vec)) * lanes * vec
            forward = {
                **shared, "stats_ptr": None, "losses_ptr": "*fp32", "split_columns": split,
                "LANES": lanes, "VEC": vec, "SMOOTH": smooth, "CAP": cap, "FINISH": True,
            }  # fmt: skip
            backward = {
                **shared, "dlosses_ptr": "*fp32", "dlse_ptr": None, "out_ptr": f"*{dtype}", "out_row_stride": columns,
                "BLOCK": lanes * vec, "SMOOTH": smooth, "CAP": cap, "HAS_DLOSSES": True, "HAS_DLSE": False,
            }  # fmt: skip
            # Narrow accesses, 7 of a row: the label and its logit are read, four or five numbers are written.
            case = AotCase(f"cross_entropy forward {tail}", _cross_entropy_fwd_kernel, forward, warps, 2, wants)
            cases.append(replace(case, narrow_allowed=7))
            cases.append(
                AotCase(f"cross_entropy backward {tail}", _cross_entropy_bwd_kernel, backward, warps, 2, wants)
            )
            if vocab_size == 128256:
                outputs = dict.fromkeys(("losses_ptr", "lse_ptr", "saved_ptr"))
                parts = {**forward, **outputs, "stats_ptr": "*fp32", "FINISH": False, "M": "i32"}
                case = AotCase(f"cross_entropy statistics {tail}", _cross_entropy_fwd_kernel, parts, warps, 2, wants)
                cases.append(replace(case, narrow_allowed=7))
    for smooth in (False, True):
        join = {
            **terms, "stats_ptr": "*fp32", "losses_ptr": "*fp32", "lse_ptr": "*fp32", "M": "i32",
            "parts": "i32", "BLOCK_M": 128, "SMOOTH": smooth,
        }  # fmt: skip
        cases.append(AotCase(f"cross_entropy join{' smoothed' if smooth else ''}", _join_kernel, join, 4))
    return cases
