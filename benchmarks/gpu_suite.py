"""Everything worth knowing from one short loan of a GPU, in one command that brings something back if half of it fails.

    python benchmarks/gpu_suite.py --out FOLDER [--budget-s 540] [--only tests,kernels,…]

Needs torch, triton, numpy, pytest and transformers; uses Liger, Transformer Engine, flash-attn and apex where they can
be imported. Every stage runs in a process of its own with its share of the time, writes FOLDER/<stage>.json when it
ends, and is passed over when that file says it succeeded: started again, the suite goes on where it was cut off.
FOLDER/summary.md and FOLDER/suite.json are what to take home.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Seconds of each stage in a budget of 540; what one leaves goes to those after it.
STAGES = {"environment": 15, "check": 60, "tests": 110, "kernels": 170, "step": 90, "training": 55, "counters": 35}
BUDGET_S = 540.0
# Two layers of a Llama-3 8B beside megatron-core's and transformers', as `llm-parallel bench step` runs them.
TRAINING = (
    "--model", "llama3-8b", "model.num_layers=2", "data.seq_length_tokens=4096", "train.precision=bf16",
    "train.global_batch_size=2", "train.micro_batch_size=1", "--rounds", "1", "--steps", "8",
)  # fmt: skip
STEP_SHAPES = {"1b": (4096, 2), "7b, 2 layers": (4096, 4)}


def environment() -> dict[str, Any]:
    """Chip, driver, versions, commit."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in (
        "torch",
        "triton",
        "numpy",
        "transformers",
        "liger-kernel",
        "transformer-engine",
        "flash-attn",
        "apex",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "date": str(date.today())}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "chip": properties.name, "memory_gib": properties.total_memory / 2**30,
            "sms": properties.multi_processor_count, "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
        }  # fmt: skip
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found["nvidia_smi"] = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    else:
        found["chip"] = f"{platform.machine()} CPU, no GPU"
    found["commit"] = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    return found


def check() -> dict[str, Any]:
    """Operator → null or what is wrong on its small shape."""
    from llm_kernels.aot import OPERATORS
    from llm_kernels.check import check as check_one

    return {name: check_one(name) for name in OPERATORS}


def tests(seconds: float) -> dict[str, Any]:
    """The kernels' own tests on this machine."""
    report = Path(os.environ["SUITE_OUT"]) / "tests.xml"
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "kernels"), "-v", "-p", "no:cacheprovider", "-k",
        "not every_configuration", f"--junitxml={report}", "--tb=line",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds - 5, 5))
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(errors="replace"), None
    return {"exit": code, **outcomes(output), "tail": output[-4000:]}


def outcomes(output: str) -> dict[str, Any]:
    """How each test of pytest's verbose output ended; what was not reached in time is counted too."""
    ended = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.M)
    counts = {kind.lower(): sum(k == kind for _, k in ended) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    selected = re.search(r"\bcollected (\d+) items?(?: / (\d+) deselected)?", output, re.M)
    if selected:
        counts["not reached"] = int(selected[1]) - int(selected[2] or 0) - len(ended)
    return {"counts": counts, "failures": [name for name, kind in ended if kind in ("FAILED", "ERROR")][:60]}


def kernels(seconds: float) -> dict[str, Any]:
    """Every operator beside its peers, a shape of each in turn, until the time is used."""
    import torch

    from llm_kernels import measure
    from llm_kernels.aot import OPERATORS
    from llm_kernels.check import benchmark_of

    deadline, device = time.monotonic() + seconds - 5, torch.device("cuda")
    card = measure.measure_card(device)
    rows: list[dict[str, Any]] = []
    most = max(len(benchmark_of(name).shapes) for name in OPERATORS)
    queue = [(turn, name) for turn in range(most) for name in OPERATORS]
    left_out = []
    for turn, name in queue:
        benchmark = benchmark_of(name)
        if turn >= len(benchmark.shapes):
            continue
        if time.monotonic() > deadline:
            left_out.append(f"{name} {benchmark.shapes[turn]['name']}")
            continue
        try:
            found = measure.measure(benchmark, card, device, [benchmark.shapes[turn]], rounds=15)
            rows += measure.as_data(list(found))
        except Exception as error:  # one operator's failure is a result
            rows.append({"operator": name, "shape": benchmark.shapes[turn]["name"], "mode": "all", "provider": "ours",
                         "dtype": "", "median_ms": None, "note": f"{type(error).__name__}: {error}"[:300]})  # fmt: skip
            torch.cuda.empty_cache()
        _write(Path(os.environ["SUITE_OUT"]) / "kernels.partial.json", {"card": vars(card), "rows": rows})
    return {"card": vars(card), "rows": rows, "left_out": left_out}


def step(seconds: float) -> dict[str, Any]:
    """A training step (forward, backward, clipping, AdamW; bf16 compute, fp32 master weights) of each contender."""
    import torch

    deadline = time.monotonic() + seconds - 5
    results = []
    for name, (tokens, rows) in STEP_SHAPES.items():
        for contender in ("ours", "torch", "torch.compile", "transformers", "transformers.compile"):
            if time.monotonic() > deadline:
                results.append({"model": name, "contender": contender, "note": "no time left"})
                continue
            try:
                results.append(_measure_step(name, contender, tokens, rows))
            except Exception as error:  # a contender's failure is a result
                results.append(
                    {"model": name, "contender": contender, "note": f"{type(error).__name__}: {error}"[:300]}
                )
            torch.cuda.empty_cache()
            _write(Path(os.environ["SUITE_OUT"]) / "step.partial.json", results)
    return {
        "steps": results,
        "mfu": "model FLOPs of matrix products, causal attention by half, over 989 TFLOP/s dense bf16",
    }


def _measure_step(
    name: str, contender: str, tokens: int, rows: int, warmup: int = 4, repeats: int = 8
) -> dict[str, Any]:
    import torch

    from benchmarks.llama_stack import SHAPES

    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    shape = SHAPES[name]
    run = _step_function(contender, shape, tokens, rows)
    losses = [float(run()) for _ in range(warmup)]
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    median = statistics.median(times)
    rate = tokens * rows / median * 1e3
    return {
        "model": name, "contender": contender, "tokens": tokens, "rows": rows, "median_ms": median,
        "min_ms": min(times), "max_ms": max(times), "tokens_per_s": rate,
        "mfu": rate * shape.flops_per_token(tokens) / 989e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "first_losses": losses,
    }  # fmt: skip


def _step_function(contender: str, shape: Any, tokens: int, rows: int) -> Callable[[], Any]:
    import torch

    from benchmarks.llama_stack import LlamaStack, ours, plain, transformers_model
    from llm_kernels.adamw.optimizer import FusedAdamW

    device = "cuda"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.words, (rows, tokens + 1), generator=generator).to(device)
    theirs = transformers_model(shape, device)
    if contender.startswith("transformers"):
        model = theirs.to(torch.bfloat16)
        compiled = torch.compile(model) if contender.endswith("compile") else model

        def forward() -> Any:
            return compiled(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
    else:
        stack = LlamaStack(shape, ours() if contender == "ours" else plain(), tokens, device)
        stack.load_transformers(theirs)
        model = stack.to(torch.bfloat16)
        del theirs
        compiled = torch.compile(model) if contender.endswith("compile") else model
        sequence_first = [x.t().contiguous() for x in (ids[:, :-1], ids[:, 1:])]
        forward = partial(compiled, *sequence_first)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    parameters = list(model.parameters())
    optimizer: Any
    if contender == "ours":
        optimizer = FusedAdamW(masters, **settings)
        optimizer.low = {master: p.data for master, p in zip(masters, parameters)}
    else:
        optimizer = torch.optim.AdamW(masters, fused=True, **settings)

    def run() -> Any:
        loss = forward()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        factor = (1.0 / (norm.float() + 1e-6)).clamp(max=1.0)
        if contender == "ours":
            optimizer.scale = factor
            for master, p in zip(masters, parameters):
                master.grad, p.grad = p.grad, None  # bf16 gradients are read as they are
            optimizer.step()
        else:
            for master, p in zip(masters, parameters):
                master.grad, p.grad = p.grad.float(), None
            torch._foreach_mul_([master.grad for master in masters], factor)
            optimizer.step()
            torch._foreach_copy_(parameters, masters)
        for master in masters:
            master.grad = None
        return loss.detach()

    return run


def training(seconds: float) -> dict[str, Any]:
    """The whole training step on megatron-core beside its peers, where megatron-core is importable."""
    import importlib.util

    missing = [name for name in ("megatron", "pydantic", "typer") if importlib.util.find_spec(name) is None]
    if missing:
        return {"note": f"{', '.join(missing)} not installed; the stage step measured the operators without"}
    prefix = Path(os.environ["SUITE_OUT"]) / "bench_step"
    command = [sys.executable, "-m", "llm_parallel.cli", "bench", "step", *TRAINING, "--out", str(prefix)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds - 5, 5))
    return {"exit": done.returncode, "table": done.stdout[-6000:], "errors": done.stderr[-3000:]}


def counters(seconds: float) -> dict[str, Any]:
    """Nsight Compute's view of the operator bound by memory that is furthest from the copy bandwidth."""
    if shutil.which("ncu") is None:
        return {"note": "ncu is not installed"}
    measured = _read(Path(os.environ["SUITE_OUT"]) / "kernels.json") or {}
    rows = [
        row for row in measured.get("result", {}).get("rows", [])
        if row.get("provider") == "ours" and row.get("fraction") and row["bound"] == "memory" and row["mode"] != "both"
    ]  # fmt: skip
    worst = min(rows, key=lambda row: row["fraction"], default={"operator": "rms_norm"})
    command = [
        "ncu", "--set", "basic", "--launch-count", "6", sys.executable, "-m", "llm_kernels.check", "--op",
        worst["operator"],
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds - 5, 5))
    return {"operator": worst["operator"], "output": (done.stdout + done.stderr)[-12000:]}


def summary(out: Path) -> str:
    """What the stages found, as Markdown."""
    found = {name: (_read(out / f"{name}.json") or {}) for name in STAGES}
    env = found["environment"].get("result", {})
    lines = [
        f"# {env.get('chip', 'unknown chip')}, {env.get('date', '')}",
        "",
        "```",
        json.dumps(env, indent=1),
        "```",
        "",
    ]
    lines += ["| stage | state | seconds |", "| --- | --- | --- |"]
    for name in STAGES:
        lines.append(f"| {name} | {found[name].get('state', 'did not run')} | {found[name].get('seconds', 0):.0f} |")
    for name, problem in found["check"].get("result", {}).items():
        if problem:
            lines.append(f"\n**{name} is wrong**: {problem}")
    tested = found["tests"].get("result", {})
    counts = ", ".join(f"{count} {name}" for name, count in tested.get("counts", {}).items())
    lines.append(f"\nKernel tests: {counts or 'none ran'}")
    lines += [f"- {failure}" for failure in tested.get("failures", [])]
    measured = found["kernels"].get("result") or _read(out / "kernels.partial.json") or {}
    if measured.get("rows"):
        from llm_kernels.measure import Row, table

        card = measured["card"]
        lines.append(
            f"\nMeasured on this card: copy {card['copy_bytes_per_s'] / 1e9:.0f} GB/s, bf16 product "
            f"{card['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s.\n"
        )
        lines.append(table([Row(**row) for row in measured["rows"]]))
        lines += [f"\nNo time for: {', '.join(measured['left_out'])}"] if measured.get("left_out") else []
    steps = (found["step"].get("result") or {}).get("steps") or _read(out / "step.partial.json") or []
    if steps:
        lines += ["", "| model | contender | ms a step | tokens/s | MFU | peak GiB | |", "|" + " --- |" * 7]
        for row in steps:
            numbers = "| | | |" if "median_ms" not in row else (
                f"{row['median_ms']:.1f} | {row['tokens_per_s']:,.0f} | {row['mfu']:.1%} | {row['peak_gib']:.1f}"
            )  # fmt: skip
            lines.append(f"| {row['model']} | {row['contender']} | {numbers} | {row.get('note', '')} |")
        lines.append(f"\nMFU: {(found['step'].get('result') or {}).get('mfu', '')}")
    trained = found["training"].get("result", {})
    lines += ["", trained.get("table") or trained.get("note", "")]
    return "\n".join(lines) + "\n"


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=20).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str))
    temporary.replace(path)


def run_stage(name: str, seconds: float) -> None:
    """Body of a stage's own process."""
    import torch

    if name in ("kernels", "step", "training", "counters") and not torch.cuda.is_available():
        _write(Path(os.environ["SUITE_OUT"]) / f"{name}.json", {"state": "needs a GPU"})
        return
    with_time = {"tests": tests, "kernels": kernels, "step": step, "training": training, "counters": counters}
    result = with_time[name](seconds) if name in with_time else {"environment": environment, "check": check}[name]()
    _write(Path(os.environ["SUITE_OUT"]) / f"{name}.json", {"state": "done", "result": result})


def suite(out: Path, budget_s: float, only: Sequence[str]) -> int:
    """Runs the stages; exit status 0 if all came to their end."""
    out.mkdir(parents=True, exist_ok=True)
    started, scale = time.monotonic(), budget_s / BUDGET_S
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "SUITE_OUT": str(out), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    if not Path("/dev/nvidia0").exists():
        env["TRITON_INTERPRET"] = "1"
    planned, failed = 0.0, 0
    for name, share in STAGES.items():
        planned += share * scale
        if name not in only or (_read(out / f"{name}.json") or {}).get("state") == "done":
            continue
        seconds = max(planned - (time.monotonic() - started), 10.0)
        began = time.monotonic()
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        command = [sys.executable, str(Path(__file__)), "--out", str(out), "--stage", name, "--seconds", str(seconds)]
        try:
            with (out / f"{name}.log").open("w") as log:
                subprocess.run(command, env=env, stdout=log, stderr=log, timeout=seconds + 5, check=True)
        except subprocess.SubprocessError as error:
            state = "ran out of time" if isinstance(error, subprocess.TimeoutExpired) else "failed"
            tail = (out / f"{name}.log").read_text(errors="replace")[-3000:]
            _write(out / f"{name}.json", {"state": state, "log": tail})
            print(f"{name} {state}:\n{tail[-800:]}", flush=True)
            failed += 1
        record = _read(out / f"{name}.json") or {}
        _write(out / f"{name}.json", record | {"seconds": time.monotonic() - began})
    _write(out / "suite.json", {name: _read(out / f"{name}.json") for name in STAGES})
    text = summary(out)
    (out / "summary.md").write_text(text)
    print(text)
    return 1 if failed else 0


def main() -> int:
    """Runs the suite, or one stage of it for the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.seconds)
        return 0
    only = arguments.only.split(",")
    if not 60 <= arguments.budget_s <= 86400:
        print(f"error: --budget-s {arguments.budget_s:g} is not between 60 and 86400 seconds", file=sys.stderr)
        return 2
    unknown = [name for name in only if name not in STAGES]
    if unknown:
        print(f"error: --only {unknown[0]} is no stage; there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    return suite(arguments.out, arguments.budget_s, only)


if __name__ == "__main__":
    raise SystemExit(main())
