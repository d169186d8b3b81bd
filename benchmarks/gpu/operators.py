"""Stages that run single operators: they check them at real sizes, time them and their peers, and check the Gluon
attention in a process of its own before it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import Job, Lost, failure

MODELS = ("llama3-8b", "llama3-70b tp8")
# Bound by memory first, then by products; the cheap before the dear.
ORDER = ("rms_norm", "swiglu", "rope", "cross_entropy", "adamw", "paged_attention", "attention",
         "linear_cross_entropy")  # fmt: skip
# What a rehearsal changes of an operator's small shape so that interpreting it takes a second.
TINY: dict[str, dict[str, Any]] = {
    "rms_norm": {"tokens": 32}, "swiglu": {"tokens": 4, "width": 256}, "rope": {"heads": 2, "groups": 1},
    "cross_entropy": {"tokens": 4, "vocab_size": 512}, "adamw": {"parameters": 8 * 1024}, "attention": {"tokens": 32},
    "paged_attention": {"keys": 64},
    "linear_cross_entropy": {"vocab_size": 256},
}  # fmt: skip
# Real sizes with fewer tokens: attention in fp64 holds its whole matrix of scores.
CORRECTNESS_TOKENS = 2048
ROUNDS = 12
# A shape is begun only if so much time is left: compiling and timing one takes seconds.
LEAST_S = {"attention": 10.0, "linear_cross_entropy": 15.0}
LEAST_OF_OTHERS_S = 6.0
LATER = ("torch.compile", "ours-gluon")
"""Providers that have a stage of their own."""


def shapes_of(operator: str, rehearse: bool) -> list[Mapping[str, Any]]:
    """Shapes at which an operator is measured: those of MODELS, or all if it has none of these."""
    from llm_kernels.check import benchmark_of

    benchmark = benchmark_of(operator)
    if rehearse:
        return [{**benchmark.small, **TINY[operator]}]
    named = [s for s in benchmark.shapes if any(model in s.get("models", ()) for model in MODELS)]
    return named or list(benchmark.shapes)


def in_turns(operators: Sequence[str], rehearse: bool) -> list[tuple[str, Mapping[str, Any]]]:
    """The first shape of every operator, then the second of each, and so on, so that a cut loses the least."""
    of_each = {name: shapes_of(name, rehearse) for name in operators}
    most = max(map(len, of_each.values()))
    return [(name, shapes[turn]) for turn in range(most) for name, shapes in of_each.items() if turn < len(shapes)]


def correctness(job: Job) -> dict[str, Any]:
    """Checks each operator and dtype at a real size, forward and backward, against fp64."""
    chosen = machine.start_kernels(job.rehearse)
    from llm_kernels.check import check
    from llm_kernels.device import is_lost, release
    from llm_kernels.testing import SUMMARY

    result: dict[str, Any] = {"rows": list(job.previous.get("rows", [])), "left_out": []}
    done = {row["operator"] for row in result["rows"]}
    for name in ORDER:
        if name in done:
            continue
        if job.left() < LEAST_OF_OTHERS_S:
            result["left_out"].append(name)
            continue
        shape = dict(shapes_of(name, job.rehearse)[0])
        if "tokens" in shape:
            shape["tokens"] = min(shape["tokens"], CORRECTNESS_TOKENS)
        began = time.monotonic()
        problem = check(name, shape)
        errors = [pair for (case, _), pairs in SUMMARY.rows.items() if case == name for pair in pairs]
        worst, framework = max(errors, default=(None, None))
        result["rows"].append({
            "operator": name, "shape": ", ".join(f"{k} {v}" for k, v in shape.items() if k not in ("name", "models")),
            "problem": problem, "worst_error": worst, "framework_error": framework,
            "seconds": time.monotonic() - began,
        })  # fmt: skip
        job.save(result)
        if is_lost(chosen):
            raise Lost(f"{name} has ended all CUDA work of the process")
        release(chosen)
    wrong = [row["operator"] for row in result["rows"] if row["problem"]]
    return result | ({"problem": f"wrong: {', '.join(wrong)}"} if wrong else {})


def operators(job: Job) -> dict[str, Any]:
    """Times every operator and its peers, except providers that have a stage of their own."""
    return measured(job, in_turns(ORDER, job.rehearse), lambda name: name not in LATER)


def gluon(job: Job) -> dict[str, Any]:
    """Checks the Gluon attention in a process of its own, and then times it."""
    chosen = machine.start_kernels(job.rehearse)
    from llm_kernels.attention.bench import gluon_fault
    from llm_kernels.device import release

    release(chosen)
    fault = gluon_fault("triton") if job.rehearse else gluon_fault()
    job.save({**job.previous, "proof": fault or "right"})
    if fault is not None:
        return {"proof": fault}
    wanted = ("ours", "ours-gluon", "torch cudnn")
    return {**measured(job, in_turns(["attention"], job.rehearse), lambda name: name in wanted), "proof": "right"}


def measured(
    job: Job, items: Sequence[tuple[str, Mapping[str, Any]]], wanted: Callable[[str], bool], reserve_s: float = 0.0
) -> dict[str, Any]:
    """Rows of the items, (operator, shape) each, by the providers that are wanted. What an earlier try measured is
    kept; a provider that ended its process is left out of that item. reserve_s: left to what comes after."""
    chosen = machine.start_kernels(job.rehearse)
    from llm_kernels import measure
    from llm_kernels.check import benchmark_of

    result = _so_far(job.previous)
    card = measure.Card(**(job.results.get("environment", {}).get("card") or vars(measure.measure_card(chosen))))
    result["card"] = vars(card)
    for operator, shape in items:
        key = f"{operator} {shape['name']}"
        if key in result["done"]:
            continue
        if job.left() < LEAST_S.get(operator, LEAST_OF_OTHERS_S) + reserve_s:
            result["left_out"].append(key)
            continue
        rows: list[measure.Row] = []

        def keep(**more: Any) -> None:
            job.save({**result, "rows": [*result["rows"], *measure.as_data(rows)], **more})  # noqa: B023 called here

        keep(begun=key)
        try:
            benchmark = benchmark_of(operator)
            broken = result["broken"].get(key, [])
            kept = {n: load for n, load in benchmark.providers.items() if wanted(n) and n not in broken}
            only = replace(benchmark, providers=kept)
            for row in measure.measure(only, card, chosen, [shape], 2 if job.rehearse else ROUNDS):
                rows.append(row)
                keep(begun=key)
        except measure.DeviceLost as lost:
            result["broken"].setdefault(key, []).append(lost.provider)
            keep()
            raise Lost(str(lost)) from lost
        except Exception as error:  # one operator's failure is a result
            rows.append(measure.Row(operator, shape["name"], "", "all", "ours", note=f"failed: {failure(error)}"))
        result["rows"] += measure.as_data(rows)
        result["done"].append(key)
        job.save(result)
    return result


def _so_far(previous: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier try measured: whole items, and the rows of providers that ended their process. An item in which
    the process died for an unknown reason is not tried again."""
    result: dict[str, Any] = {"rows": [], "done": [], "broken": {}, **previous, "left_out": []}
    begun, died = result.pop("begun", None), result.pop("died", False)

    def is_whole(row: Mapping[str, Any]) -> bool:
        key = f"{row['operator']} {row['shape']}"
        return key in result["done"] or (row["median_ms"] is None and row["provider"] in result["broken"].get(key, []))

    if died and begun:
        result["done"] = [*result["done"], begun]
        operator, shape = begun.split(" ", 1)
        row = dict.fromkeys(("dtype", "median_ms")) | {"operator": operator, "shape": shape, "mode": "all"}
        result["rows"] = [*result["rows"], row | {"provider": "any", "note": "failed: the process died in this"}]
    result["rows"] = [row for row in result["rows"] if is_whole(row)]
    return result
