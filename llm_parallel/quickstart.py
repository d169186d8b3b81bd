"""``llm-parallel quickstart``: from text on this machine to a small Llama that was trained with TP 2 x PP 2.

The corpus is the source and documentation of the Python standard library of the running interpreter: tens of megabytes
of real text that every machine has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llm_parallel.config.load import load_config
from llm_parallel.data.corpus import prepare_python_corpus
from llm_parallel.files import atomic_write
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.metrics.plots import plot_run
from llm_parallel.train.preflight import NVIDIA_DEVICE
from llm_parallel.worker.command import train_command

VOCABULARY = 4096
PROMPT = "def read_lines(path):\n"


def quickstart_command(folder: Path, overrides: Sequence[str]) -> int:
    """Prepares text once, trains or resumes the run in ``folder``, draws its curves, and generates text; returns the
    exit status."""
    started = time.monotonic()
    corpus = prepare_python_corpus(folder / "data", vocab_size=VOCABULARY)
    print(f"corpus: {corpus.describe()}", flush=True)
    run_file = folder / "run.yaml"
    with atomic_write(run_file) as handle:
        yaml.safe_dump(run_tree(folder, num_gpus()), handle, sort_keys=False)
    print(f"run file: {run_file} (start it again with: llm-parallel pretrain {run_file})", flush=True)
    status = train_command("pretrain", str(run_file), [*overrides, "log.plots=false"], suggest=lambda _: None)
    if status:
        return status
    run_dir = Path(load_config(run_file, overrides).run_dir)
    report(run_dir, corpus.unigram_entropy_nats)
    from llm_parallel.generate.command import generate_command

    print("\nsample (temperature 0.7):", flush=True)
    generate_command(
        str(run_dir), [PROMPT], max_new_tokens=96, temperature=0.7, top_k=50, top_p=0.95, seed=1, device="auto"
    )
    for picture in plot_run(run_dir, unigram_entropy=corpus.unigram_entropy_nats):
        print(f"plot: {picture}")
    print(f"run folder: {run_dir}\nwall time: {time.monotonic() - started:.0f} s")
    return 0


def num_gpus() -> int:
    """Number of NVIDIA GPUs of this machine, found without importing torch."""
    return len(list(NVIDIA_DEVICE.parent.glob("nvidia[0-9]*")))


def run_tree(folder: Path, gpus: int) -> dict[str, Any]:
    """The run file for this machine: TP 2 x PP 2 on four CPU processes or at least four GPUs; what fits fewer GPUs.

    On GPUs the batch is larger and the precision is bf16.
    """
    data, replicas = folder / "data", max(1, gpus // 4)
    tp, pp = (1 if gpus == 1 else 2), (2 if gpus == 0 or gpus >= 4 else 1)
    train: dict[str, Any] = {"global_batch_size": 16, "micro_batch_size": 4, "steps": 200, "eval_interval_steps": 50}
    if gpus:
        train |= {"global_batch_size": 64 * replicas, "steps": 1000, "precision": "bf16"}
    return {
        "run_dir": str(folder / "run"),
        "model": {"preset": "tiny"},
        "data": {
            "train": [{"path": str(data / "train")}],
            "eval": [{"path": str(data / "eval")}],
            "tokenizer": str(data / "tokenizer.model"),
            "seq_length_tokens": 256,
        },
        "parallel": {"dp": replicas, "tp": tp, "pp": pp},
        "train": train,
        "optim": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 20},
        "checkpoint": {"interval_steps": 100},
    }


def report(run_dir: Path, unigram_entropy_nats: float) -> None:
    """Prints the last held-out loss, and the loss of a model that knows only how frequent each token is."""
    evaluations = [record for record in read_jsonlines(run_dir / "metrics.jsonl") if "eval/loss" in record]
    loss = evaluations[-1]["eval/loss"]
    summary = {
        "held_out_loss_nats_per_token": loss,
        "unigram_entropy_nats_per_token": unigram_entropy_nats,
        "below_unigram_nats": unigram_entropy_nats - loss,
    }
    with atomic_write(run_dir / "summary.json") as handle:
        json.dump(summary, handle, indent=1)
    print(
        f"held-out loss {loss:.3f} nats per token; unigram entropy of the corpus {unigram_entropy_nats:.3f}: "
        f"{unigram_entropy_nats - loss:.3f} below"
    )
