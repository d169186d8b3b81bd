"""``llm-parallel quickstart``: from text on this machine to a small Llama that was trained with TP 2 x PP 2.

The corpus is the source and documentation of the Python standard library of the running interpreter: megabytes of real
text that every machine has.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from llm_parallel.config.load import load_config
from llm_parallel.config.schema import SCHEMA_LINE, write_schema
from llm_parallel.data.corpus import PythonCorpus, prepare_python_corpus
from llm_parallel.files import atomic_write
from llm_parallel.jsonlines import JsonLines, read_jsonlines
from llm_parallel.lines import say
from llm_parallel.metrics.plots import plot_run
from llm_parallel.quickstart_assistant import CHAT_STEPS, GPU_CHAT_STEPS, TRY, ask, fine_tune, report_answers
from llm_parallel.screen import show
from llm_parallel.train.preflight import NVIDIA_DEVICE
from llm_parallel.worker.command import train_command

VOCABULARY = 4096
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_seq_length_tokens": 1024,
    "tie_embeddings": True,
}
"""A million parameters, which two CPU cores train on 1.4 million tokens in a few minutes."""
PROMPT = '    def __init__(self, name, path=None):\n        """'
SAMPLE_TOKENS = 96


@dataclass
class Parts:
    """The parts of the quickstart, announced as they begin, with the seconds that each took."""

    number: int
    done: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, what: str) -> Iterator[None]:
        """Prints a heading, and keeps the time until the end of the block."""
        show(f"\n[{len(self.done) + 1}/{self.number}] {what}")
        started = time.monotonic()
        yield
        self.done[name] = time.monotonic() - started

    def describe(self) -> str:
        """The time of every part and of all together."""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.done.items())
        return f"time: {sum(self.done.values()):.0f} s ({parts})"


def quickstart_command(folder: Path, overrides: Sequence[str], chat: bool = True, chat_steps: int | None = None) -> int:
    """Prepares text once, trains or resumes the run in ``folder``, generates text, fine-tunes the model into an
    assistant (``chat``) and asks it, and draws plots and reports; returns the exit status. ``overrides`` are of the
    pretraining; the fine-tuning takes model, layout and batch from it, and makes ``chat_steps`` steps."""
    parts = Parts(6 if chat else 4)
    with parts.part("text", "text: files of this machine's Python library become tokens (about ten seconds)"):
        corpus = prepare_python_corpus(folder / "data", vocab_size=VOCABULARY)
        say(f"corpus: {corpus.describe()}")
    gpus = num_gpus()
    tree = run_tree(folder, gpus)
    run_file = folder / "run.yaml"
    with atomic_write(run_file) as handle:
        handle.write(SCHEMA_LINE)
        yaml.safe_dump(tree, handle, sort_keys=False)
    write_schema(folder)
    layout = f"TP {tree['parallel']['tp']} x PP {tree['parallel']['pp']}"
    with parts.part("training", f"training with {layout}: starting the processes takes some seconds"):
        say(f"run file: {run_file}")
        status = train_command("pretrain", str(run_file), [*overrides, "log.plots=false"], suggest=lambda _: None)
    if status:
        return status
    config = load_config(run_file, overrides)
    run_dir = Path(config.run_dir)
    with parts.part("sample", "sample: loading the model, which then writes on from a prompt (some seconds)"):
        step = report(run_dir, corpus.unigram_entropy_nats)
        sample(run_dir, step)
    if chat:
        what = "fine-tuning: the model learns from conversations to answer and to stop"
        with parts.part("fine-tuning", what):
            steps = chat_steps or (GPU_CHAT_STEPS if gpus else CHAT_STEPS)
            status = fine_tune(folder, config, step, steps)
        if status:
            return status
        with parts.part("assistant", "assistant: it answers questions that were not in its training (some seconds)"):
            said = report_answers(folder / "chat", ask(folder / "chat"))
    with parts.part("pictures", "pictures: plots and an HTML report (some seconds)"):
        draw(folder, run_dir, corpus)
        if chat:
            draw_assistant(folder, said)
    show(f"\n{parts.describe()}")
    say(f"What to try next:\n{next_commands(folder, run_file, run_dir, chat)}")
    return 0


def num_gpus() -> int:
    """Number of NVIDIA GPUs of this machine, found without importing torch."""
    return len(list(NVIDIA_DEVICE.parent.glob("nvidia[0-9]*")))


def run_tree(folder: Path, gpus: int) -> dict[str, Any]:
    """The run file for this machine: TP 2 x PP 2 on four CPU processes or at least four GPUs; what fits fewer GPUs.

    On GPUs model and batch are larger and the precision is bf16. On a CPU the batch is one micro batch: four processes
    share two cores, which the two of either stage keep busy, so smaller ones cost time and fill no bubble.
    """
    data, replicas = folder / "data", max(1, gpus // 4)
    tp, pp = (1 if gpus == 1 else 2), (2 if gpus == 0 or gpus >= 4 else 1)
    model: dict[str, Any] = MODEL
    train: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 8, "steps": 700, "eval_interval_steps": 175}
    optim = {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 60}
    if gpus:
        model = {"preset": "tiny"}
        train = {"global_batch_size": 64 * replicas, "micro_batch_size": 4, "steps": 1000, "eval_interval_steps": 200}
        train["precision"] = "bf16"
        optim = {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 20}
    return {
        "run_dir": str(folder / "run"),
        "model": model,
        "data": {
            "train": [{"path": str(data / "train")}],
            "eval": [{"path": str(data / "eval")}],
            "tokenizer": str(data / "tokenizer.model"),
            "seq_length_tokens": 256,
        },
        "parallel": {"dp": replicas, "tp": tp, "pp": pp},
        "train": train,
        "optim": optim,
        "checkpoint": {"interval_steps": 400},
        "log": {"interval_steps": 10},
    }


def report(run_dir: Path, unigram_entropy_nats: float) -> int:
    """Prints the last held-out loss, and the loss of a model that knows only how frequent each token is; returns the
    step after which it was measured, which is the last one."""
    evaluations = [record for record in read_jsonlines(run_dir / "metrics.jsonl") if "eval/loss" in record]
    loss = evaluations[-1]["eval/loss"]
    summary = {
        "held_out_loss_nats_per_token": loss,
        "unigram_entropy_nats_per_token": unigram_entropy_nats,
        "below_unigram_nats": unigram_entropy_nats - loss,
    }
    with atomic_write(run_dir / "summary.json") as handle:
        json.dump(summary, handle, indent=1)
    say(
        f"held-out loss {loss:.4f} nats per token; unigram entropy of the corpus {unigram_entropy_nats:.4f}: "
        f"{unigram_entropy_nats - loss:.4f} below"
    )
    step: int = evaluations[-1]["step"]
    return step


def sample(run_dir: Path, step: int) -> None:
    """Prints a text that the model writes on from ``PROMPT``, and records it for the report."""
    from llm_parallel.generate.command import generate_command
    from llm_parallel.generate.sampling import Sampling

    (text,) = generate_command(str(run_dir), [PROMPT], Sampling(SAMPLE_TOKENS, 0.6, top_k=40, top_p=0.9, seed=1))
    lines = JsonLines(run_dir / "metrics.jsonl")
    try:
        lines.append({"event": "answer", "step": step, "prompt": PROMPT, "answer": text, "stopped": False})
    finally:
        lines.close()


def draw(folder: Path, run_dir: Path, corpus: PythonCorpus) -> None:
    """Draws the plots, and writes the report beside the run."""
    from llm_parallel.report.command import report_command
    from llm_parallel.report.request import ReportRequest

    for picture in plot_run(run_dir, unigram_entropy=corpus.unigram_entropy_nats):
        say(f"plot: {picture}")
    report_command(ReportRequest([str(run_dir)], out=str(folder / "report.html")))


def draw_assistant(folder: Path, said: str) -> None:
    """Draws the plots of the fine-tuning and its own report, since its losses are of other tokens than the
    pretraining's; ``said``: how many answers were right."""
    from llm_parallel.report.command import report_command
    from llm_parallel.report.request import ReportRequest

    for picture in plot_run(folder / "chat"):
        say(f"plot: {picture}")
    title = f"The assistant: {said}"
    report_command(ReportRequest([str(folder / "chat")], out=str(folder / "chat.html"), title=title))


def next_commands(folder: Path, run_file: Path, run_dir: Path, chat: bool) -> str:
    """Commands that go on from here, each under what it does, as they can be typed in this shell."""
    command = sys.argv[0] if Path(sys.argv[0]).name == "llm-parallel" else "llm-parallel"
    if shutil.which("llm-parallel"):
        command = "llm-parallel"
    steps = 2 * yaml.safe_load(run_file.read_text())["train"]["steps"]
    assistant, tokenizer, mine = folder / "chat", folder / "data" / "tokenizer.model", folder.parent / "mine"
    file, chat_file, run, mine_run, mine_chat = map(
        quote, map(str, (run_file, folder / "chat.yaml", run_dir, f"{mine}-run", f"{mine}-chat"))
    )
    ask_it = f'generate {quote(str(assistant))} --chat --prompt "{TRY}"'
    other_layout = f"pretrain {file} train.steps={steps} parallel.pp=1"
    own_tokens = f"prepare YOUR_FOLDER --out {quote(str(mine))} --tokenizer {quote(str(tokenizer))}"
    own_text = f"pretrain {file} run_dir={mine_run} data.train={quote(str(mine))} 'data.eval=[]' data.eval_fraction=0.1"
    own_chat = f"sft {chat_file} run_dir={mine_chat} chat.train=YOUR.jsonl 'chat.eval=[]'"
    export = f"convert {quote(str(assistant if chat else run_dir))} {quote(str(folder / 'hf'))}"
    page = quote(str(folder.parent / "report.html"))
    lines = [
        *([("ask the assistant", ask_it)] if chat else []),
        ("train the first model on, in another layout", other_layout),
        ("train on your own text: first its tokens", own_tokens),
        ("then the run", own_text),
        *([("fine-tune on your own conversations", f"{own_chat} train.epochs=3 optim.warmup_steps=0")] if chat else []),
        ("write a folder that Hugging Face transformers loads", export),
        ("write one page of numbers, curves and settings", f"report {run} --out {page}"),
    ]
    return "\n".join(f"  # {what}\n  {command} {line}" for what, line in lines)
