"""What ``--help`` shows beside a command's own documentation: the group in which it is listed, and examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from llm_parallel.help_page import Command

DATA, TRAIN, OPERATE, PLAN, MEASURE, USE = "Data", "Train", "Operate", "Plan", "Measure", "Use"
"""Groups of commands, in the order in which ``llm-parallel --help`` lists them."""

WITH_OVERRIDES = {"ignore_unknown_options": True}
"""Settings of a command that takes ``--section.field value`` too."""


@dataclass(frozen=True)
class CommandHelp:
    """How one command appears in ``--help``."""

    group: str
    """Its group."""
    examples: tuple[str, ...]
    """Arguments of calls that are worth trying, without ``llm-parallel`` and the command's name."""


COMMANDS: dict[str, CommandHelp] = {
    "prepare": CommandHelp(
        DATA,
        (
            "README.md llm_parallel --out data/repository --train-vocab 1000",
            "corpus/*.jsonl.zst --out data/corpus --tokenizer models/llama/tokenizer.json --workers 16",
        ),
    ),
    "check": CommandHelp(
        DATA, ("runs/sft.yaml", "runs/sft.yaml chat.packing=pad --samples 5 --html runs/conversations.html")
    ),
    "annotate": CommandHelp(
        DATA,
        (
            "answers.jsonl",
            "runs/answers.jsonl --prompts prompts.jsonl --mode pair --overlap 2",
            "runs/grpo --mode ranking --out labels/grpo.jsonl",
            "answers.jsonl --export",
        ),
    ),
    "quickstart": CommandHelp(TRAIN, ("", "--folder runs/mine train.steps=400 --chat-steps 200", "--no-chat")),
    "pretrain": CommandHelp(
        TRAIN,
        (
            "configs/first-run.yaml --dry-run",
            "configs/first-run.yaml --dry-run --all",
            "configs/first-run.yaml",
            "configs/first-run.yaml train.steps=150 parallel.pp=1 parallel.dp=2",
        ),
    ),
    "sft": CommandHelp(
        TRAIN,
        (
            "configs/sft.yaml --dry-run",
            "configs/sft.yaml checkpoint.load=models/SmolLM2-135M adapter.rank=16",
        ),
    ),
    "prefer": CommandHelp(
        TRAIN,
        (
            "configs/prefer.yaml --dry-run",
            "configs/prefer.yaml method.kind=kto checkpoint.load=runs/sft adapter.rank=16",
        ),
    ),
    "launch": CommandHelp(
        TRAIN,
        (
            "configs/first-run.yaml run_dir=runs/elastic parallel.pp=1 parallel.dp=2",
            "configs/first-run.yaml --processes 3",
        ),
    ),
    "submit": CommandHelp(
        TRAIN,
        (
            "configs/llama2-70b-h100x64.yaml --nodes 8 --spares 1 --time 3-00:00:00 --dry-run",
            "runs/70b.yaml --nodes 8 --array optim.lr=1e-4,3e-4 --dry-run",
        ),
    ),
    "status": CommandHelp(OPERATE, ("runs/first",)),
    "events": CommandHelp(OPERATE, ("runs/elastic", "runs/elastic --follow", "runs/elastic --json")),
    "drill": CommandHelp(
        OPERATE, ("configs/first-run.yaml --blame 1 --seed 4", "configs/first-run.yaml --blame 0 --soak-s 120")
    ),
    "plan": CommandHelp(
        PLAN,
        (
            "--model llama2-70b --cluster dgx-h100 --gpus 64 --write runs/70b.yaml",
            "--model llama3-8b --gpus 8 --explain tp=2,pp=1,mbs=1",
            "configs/sft.yaml --cluster rtx-4090 --document-tokens 200",
            "--model llama3-8b --gpus 64 --what-if gpus=128 --what-if cluster=dgx-h200",
            "--validate",
        ),
    ),
    "goodput": CommandHelp(PLAN, ("--gpus 16384 --policy wait", "--gpus 1024 --interval 600 --spares 2")),
    "fields": CommandHelp(PLAN, ("", "parallel", "optim.lr")),
    "schema": CommandHelp(PLAN, ("",)),
    "bench kernels": CommandHelp(MEASURE, ("--op rms_norm --op swiglu --out runs/kernels", "--aot --arch 90")),
    "bench step": CommandHelp(
        MEASURE,
        (
            "configs/bench-17m.yaml --out runs/step",
            "configs/bench-17m.yaml parallel.tp=2 parallel.pp=2",
            "--model llama3-8b model.num_layers=2",
        ),
    ),
    "bench comm": CommandHelp(
        MEASURE, ("--processes 4", "--ops all_reduce,all_gather --sizes 8K:64M:4 --out runs/comm")
    ),
    "bench scaling": CommandHelp(
        MEASURE, ("configs/first-sweep.yaml --dry-run", "configs/first-sweep.yaml --out runs/sweep.csv")
    ),
    "plot": CommandHelp(MEASURE, ("runs/first", "runs/first runs/elastic")),
    "report": CommandHelp(MEASURE, ("runs/first runs/elastic --csv runs/sweep.csv --out runs/report.html",)),
    "generate": CommandHelp(
        USE,
        (
            'runs/first --prompt "def " --temperature 0.7 --top-k 50',
            'runs/first-hf --prompt "import " --prompt "class "',
            'runs/quickstart/chat --chat --prompt "What is json for?"',
            'runs/first-hf --prompt "Is it spam? " --choice yes --choice no',
            "runs/first-hf --input prompts.jsonl --output answers.jsonl --samples 4 --temperature 0.7",
            "runs/sft --input prompts.jsonl --output answers.jsonl --dp 2 --temperature 0.7 --best-of 4",
        ),
    ),
    "serve": CommandHelp(USE, ("runs/quickstart/chat", "runs/first-hf --port 9000 --api-key-file keys.txt")),
    "chat": CommandHelp(
        USE,
        (
            "runs/quickstart/chat",
            "runs/quickstart/chat --system 'Answer briefly.' --temperature 0",
            "http://127.0.0.1:8000 --load conversation.json",
        ),
    ),
    "evaluate": CommandHelp(
        USE,
        (
            "models/SmolLM2-135M --demo --tasks llama2",
            "models/SmolLM2-135M --data-dir sets --tasks mmlu,hellaswag --limit 100 --out runs/eval",
            "http://127.0.0.1:8000 --tasks gsm8k_cot --data-dir sets --chat",
            "--compare runs/a/results.json runs/b/results.json",
        ),
    ),
    "convert": CommandHelp(USE, ("runs/first runs/first-hf", "models/Llama-3.2-1B runs/imported")),
}
"""Every command by its name, with that of its group of commands before it where it has one."""


def command(
    of: typer.Typer, name: str, *, within: str = "", with_overrides: bool = False, cls: type[Command] = Command
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to ``of`` as the command ``name``, with its group and examples. ``within`` is the name of the
    group of commands that ``of`` is, ``cls`` the class of the command."""
    full = f"{within} {name}".strip()
    described = COMMANDS[full]
    settings: dict[str, Any] = WITH_OVERRIDES if with_overrides else {}
    return of.command(
        name,
        cls=cls,
        rich_help_panel=described.group if not within else None,
        epilog=epilog(full, described.examples),
        context_settings=settings,
    )


def epilog(name: str, examples: tuple[str, ...]) -> str:
    """The examples as typer shows them: paragraphs become lines."""
    return "\n\n".join(["Examples:", *(f"  llm-parallel {name} {example}".rstrip() for example in examples)])
