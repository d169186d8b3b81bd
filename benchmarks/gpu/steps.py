"""A whole training step (forward, backward, clipping, AdamW; bf16 compute, fp32 master weights) without megatron-core:
our operators, torch's in the same model, and transformers' Llama."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import Job, Lost, failure

# model → (tokens of a row, rows)
SHAPES = {"1b": (4096, 2), "llama3-8b, 4 layers": (4096, 2)}
REHEARSED = {"debug": (16, 1)}
CONTENDERS = ("ours", "torch", "transformers")
# Of a dense bf16 product on H100 and H200, from NVIDIA's data sheets.
PEAK_FLOPS = 989e12
CONVENTION = "MFU: model FLOPs of matrix products, causal attention by half, over 989 TFLOP/s dense bf16"
LEAST_S = 8.0


def step(job: Job) -> dict[str, Any]:
    """Times each model with each contender, ours first."""
    models = REHEARSED if job.rehearse else SHAPES
    return measured_steps(job, [(model, contender) for model in models for contender in CONTENDERS])


def measured_steps(
    job: Job, items: Sequence[tuple[str, str]], others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A row for each (model, contender); what an earlier try measured is kept. others: what the stage found before."""
    chosen = machine.start_kernels(job.rehearse)
    from llm_kernels.device import is_lost, release

    kept = [row for row in job.previous.get("steps", []) if "median_ms" in row or row.get("lost")]
    left_out = list((others or {}).get("left_out", []))
    result: dict[str, Any] = {**(others or {}), "steps": kept, "convention": CONVENTION, "left_out": left_out}
    have = {(row["model"], row["contender"]) for row in kept}
    for model, contender in items:
        if (model, contender) in have:
            continue
        about: dict[str, Any] = {"model": model, "contender": contender}
        if job.left() < LEAST_S:
            left_out.append(f"{model} {contender}")
            continue
        try:
            row = about | measure_step(model, contender, chosen, job.rehearse)
        except Exception as error:  # a contender's failure is a result
            row = about | {"note": f"failed: {failure(error)}"}
        gc.collect()
        lost = is_lost(chosen)
        kept.append(row | ({"lost": True} if lost else {}))
        job.save(result)
        if lost:
            raise Lost(f"{contender} has ended all CUDA work of the process")
        release(chosen)
    return result


def measure_step(model: str, contender: str, chosen: Any, rehearse: bool) -> dict[str, Any]:
    """Times single steps, after a few untimed ones whose losses show that all contenders train the same model."""
    import torch

    from benchmarks.llama_stack import SHAPES as MODELS
    from llm_kernels.device import event, peak_bytes, synchronize

    tokens, rows = (REHEARSED if rehearse else SHAPES)[model]
    warmup, repeats = (2, 2) if rehearse else (4, 8)
    torch.manual_seed(0)
    run = step_function(contender, MODELS[model], (tokens, rows), chosen, "triton" if rehearse else "auto")
    losses = [float(run()) for _ in range(warmup)]
    synchronize(chosen)
    times = []
    for _ in range(repeats):
        start, end = event(chosen), event(chosen)
        start.record()
        run()
        end.record()
        synchronize(chosen)
        times.append(start.elapsed_time(end))
    median = statistics.median(times)
    rate = tokens * rows / median * 1e3
    held = torch.cuda.memory_allocated(chosen) if chosen.type == "cuda" else 0
    return {
        "tokens": tokens, "rows": rows, "median_ms": median, "min_ms": min(times), "max_ms": max(times),
        "tokens_per_s": rate, "mfu": rate * MODELS[model].flops_per_token(tokens) / PEAK_FLOPS,
        "peak_gib": (held + peak_bytes(run, chosen)) / 2**30, "first_losses": losses,
    }  # fmt: skip


def step_function(contender: str, shape: Any, size: tuple[int, int], chosen: Any, backend: str) -> Callable[[], Any]:
    """A function that runs one step and returns its loss. ``size``: tokens of a row, and rows."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocab, (size[1], size[0] + 1), generator=generator).to(chosen)
    model, forward = _model(contender, shape, ids, backend)
    return _trainer(model, forward, contender == "ours", backend)


def _model(contender: str, shape: Any, ids: Any, backend: str) -> tuple[Any, Callable[[], Any]]:
    """The model in bf16 and its forward to the loss; all contenders begin with the same weights."""
    import torch

    from benchmarks.llama_stack import LlamaStack, ours, plain, transformers_model

    theirs = transformers_model(shape, ids.device)
    maybe_compiled = torch.compile if contender.endswith("compile") else (lambda model: model)
    if contender.startswith("transformers"):
        model = theirs.to(torch.bfloat16)
        inputs = {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}
        run = maybe_compiled(model)
        return model, lambda: run(**inputs).loss
    stack = LlamaStack(shape, ours(backend) if contender == "ours" else plain(), ids.shape[1] - 1, ids.device)
    stack.load_transformers(theirs)
    model = stack.to(torch.bfloat16)
    return model, partial(maybe_compiled(model), ids[:, :-1].t().contiguous(), ids[:, 1:].t().contiguous())


def _trainer(model: Any, forward: Callable[[], Any], fused: bool, backend: str) -> Callable[[], Any]:
    """Clipping and AdamW around a forward. fused: our optimizer, which reads bf16 gradients as they are and folds the
    clip factor and the copy to bf16 into its one pass."""
    import torch

    from llm_kernels.adamw.optimizer import FusedAdamW

    parameters = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in parameters]
    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours_: Any = FusedAdamW(masters, **settings, backend=backend) if fused else None
    theirs = None if fused else torch.optim.AdamW(masters, **settings, fused=True)
    if fused:
        ours_.low = {master: p.data for master, p in zip(masters, parameters)}
        for master in masters:
            master.grad_dtype = None  # a bf16 gradient on an fp32 leaf

    @torch.no_grad()
    def update() -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        factor = (1.0 / (norm.float() + 1e-6)).clamp(max=1.0)
        for master, p in zip(masters, parameters):
            master.grad, p.grad = (p.grad if fused else p.grad.float()), None
        if theirs is None:
            ours_.scale = factor
            ours_.step()
        else:
            torch._foreach_mul_([master.grad for master in masters], factor)
            theirs.step()
            torch._foreach_copy_(parameters, masters)
        for master in masters:
            master.grad = None

    def run() -> Any:
        loss = forward()
        loss.backward()
        update()
        return loss.detach()

    return run
