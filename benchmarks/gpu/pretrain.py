"""Runs ``pretrain`` on one GPU (megatron-core, NCCL with one rank, bf16), and compares its losses with those of the
same run on the CPU (gloo, fp32), which runs at the same time. Nothing is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import ROOT, Job, failure
from benchmarks.gpu.processes import Ended, finish, run, start

STEPS = 20
REHEARSED_STEPS = 3
# Relative to the loss: on a CPU, where the same model was run in both, bf16 was 3e-4 away from fp32 after 20 steps.
TOLERANCE = 3e-3
LOSS = "train/loss"
NEEDS = ("megatron.core", "pydantic", "typer", "yaml", "psutil", "rich")
# A model whose CPU run takes seconds, and whose shapes the GPU kernels take without padding.
MODEL = {
    "num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 1024,
}  # fmt: skip
SEQUENCE = 128
DOCUMENTS = 64
_FIND = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if not u.find_spec(n.split('.')[0])])"


def pretrain(job: Job) -> dict[str, Any]:
    """A row for each run, and the largest difference of their losses."""
    machine.device(job.rehearse)
    folder = job.work / "pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    missing = run([sys.executable, "-c", _FIND, *NEEDS], folder / "find.log", 30).output.strip()
    if missing != "[]":
        raise RuntimeError(f"the packages {missing} are missing; carry their wheels (benchmarks/README.md)")
    _build_extension(folder, job.left() / 2)
    write_tokens(folder / "tokens")
    gpu = "cpu" if job.rehearse else "cuda"
    runs = {"cpu fp32": ("cpu", "fp32"), f"{gpu} bf16": (gpu, "bf16")}
    steps = REHEARSED_STEPS if job.rehearse else STEPS
    started: dict[str, tuple[subprocess.Popen, Path]] = {}
    for number, (name, (device, precision)) in enumerate(runs.items()):
        log = job.work / "details" / f"pretrain {name}.log".replace(" ", "_")
        log.unlink(missing_ok=True)
        command = command_of(folder, folder / f"run{number}", (device, precision), steps)
        started[name] = start(command, log, _environment(device)), log
    ended = {name: finish(process, log, job.left() - 3) for name, (process, log) in started.items()}
    rows = [row_of(name, ended[name], folder / f"run{number}", steps) for number, name in enumerate(runs)]
    return {"rows": rows, "tolerance": TOLERANCE, **verdict(rows)}


def command_of(folder: Path, run_dir: Path, how: tuple[str, str], steps: int) -> list[str]:
    """``pretrain`` on the tokens in ``folder``. how: device and precision."""
    tree = {
        "run_dir": str(run_dir), "device": how[0], "model": MODEL,
        "data": {"train": [{"path": str(folder / "tokens")}], "seq_length_tokens": SEQUENCE, "eval_fraction": 0},
        "train": {"global_batch_size": 8, "micro_batch_size": 8, "steps": steps, "precision": how[1],
                  "threads_per_process": max(1, (os.cpu_count() or 2) // 2)},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": min(4, steps - 1)},
        "checkpoint": {"interval_steps": steps},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(tree))  # JSON is YAML
    for old in (run_dir / "metrics.jsonl", run_dir / "checkpoints"):
        if old.exists():
            subprocess.run(["rm", "-rf", str(old)], check=True)
    return [sys.executable, "-m", "llm_parallel.cli", "pretrain", str(path)]


def _environment(device: str) -> dict[str, str]:
    """The environment without Triton's interpreter, which a rehearsal sets for other stages; on a CPU ``pretrain`` runs
    torch's operators."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept if device == "cuda" else kept | {"CUDA_VISIBLE_DEVICES": ""}


def _build_extension(folder: Path, seconds: float) -> None:
    """Compiles the C++ extension for this Python if it was not brought along. Raises RuntimeError."""
    found = run([sys.executable, "-c", "import llm_parallel._C"], folder / "extension.log", 60)
    if found.exit == 0:
        return
    command = [
        sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--build-temp", str(folder / "build"),
    ]  # fmt: skip
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    built = run(["env", "--chdir", str(ROOT), *command], log, seconds)
    if built.exit != 0:
        raise RuntimeError(f"llm_parallel._C is neither carried nor to be built here: {built.tail(500)}")


def write_tokens(prefix: Path) -> None:
    """Writes a token file that a model can learn: seven of eight tokens are a function of the previous one."""
    import numpy as np

    from llm_parallel.data.indexed import token_dtype, write_index

    vocab = MODEL["vocab_size"]
    generator = np.random.default_rng(0)
    length = 16 * SEQUENCE
    tokens = np.empty((DOCUMENTS, length), dtype=token_dtype(vocab))
    tokens[:, 0] = generator.integers(0, vocab, DOCUMENTS)
    for place in range(1, length):
        follows = (tokens[:, place - 1].astype(np.int64) * 17 + 5) % vocab
        drawn = generator.integers(0, vocab, DOCUMENTS)
        tokens[:, place] = np.where(generator.random(DOCUMENTS) < 0.125, drawn, follows)
    tokens.tofile(f"{prefix}.bin")
    with Path(f"{prefix}.idx").open("wb") as handle:
        write_index(handle.write, tokens.dtype, [np.full(DOCUMENTS, length, dtype=np.int32)])


def row_of(name: str, ended: Ended, run_dir: Path, steps: int) -> dict[str, Any]:
    """Losses of one run by step, or why there are none."""
    row: dict[str, Any] = {"run": name, "exit": ended.exit}
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        row["losses"] = [float(record[LOSS]) for record in map(json.loads, lines) if LOSS in record]
    except (OSError, ValueError, KeyError) as error:
        row |= {"losses": [], "problem": failure(error)}
    if ended.exit != 0 or len(row["losses"]) != steps:
        what = "its time was over" if ended.exit is None else f"exit status {ended.exit}"
        said = [line for line in ended.output.splitlines() if line.strip()][-2:]
        row["problem"] = f"{what}, {len(row['losses'])} of {steps} steps: {' '.join(said)}"[:600]
        logs = sorted(run_dir.glob("logs/*"))
        row["log"] = "".join(path.read_text(errors="replace")[-3000:] for path in logs)
    return row


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest relative difference of the two runs' losses over the steps of both."""
    pairs = list(zip(rows[0]["losses"], rows[1]["losses"]))
    failed = [row["run"] for row in rows if row.get("problem")]
    if failed:
        return {"worst_difference": None, "verdict": "not compared", "problem": f"{' and '.join(failed)} failed"}
    differences = [abs(a - b) / abs(a) for a, b in pairs]
    same = all(difference <= TOLERANCE for difference in differences)  # a NaN is not
    text = f"{'the same' if same else 'NOT the same'} losses over {len(pairs)} steps"
    return {"worst_difference": max(differences), "verdict": text} | ({} if same else {"problem": text})
