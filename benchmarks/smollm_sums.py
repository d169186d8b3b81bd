"""SmolLM2-135M learns to add by LoRA: fine-tuning teaches the form of an answer, then rejection sampling and GRPO raise
how many sums of 200 held-out prompts are right. Every stage is the command that a user would run.

    python benchmarks/smollm_sums.py MODEL_FOLDER --folder /tmp/sums --out benchmarks/results/smollm_sums.json

MODEL_FOLDER is a Hugging Face folder with a chat template; ``tests/support/smollm.py`` makes that of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured_on import measured_on

LARGEST = 40
NUM_HELD_OUT = 200
ANSWER_TOKENS = 8
ADAPTER = {"rank": 16, "alpha": 32}
REJECT, GRPO = "reject", "grpo"


def write_sums(folder: Path) -> None:
    """Sums of two numbers from 2 to 40: 200 that no stage trains on, and the others as conversations and as prompts."""
    pairs = list(itertools.product(range(2, LARGEST + 1), repeat=2))
    random.Random(0).shuffle(pairs)
    for name, chosen in (("held", pairs[:NUM_HELD_OUT]), ("train", pairs[NUM_HELD_OUT:])):
        asked = [[{"role": "user", "content": f"What is {a} plus {b}?"}] for a, b in chosen]
        answers = [f"Answer: {a + b}" for a, b in chosen]
        talks = [
            {"messages": [*messages, {"role": "assistant", "content": answer}]}
            for messages, answer in zip(asked, answers)
        ]
        prompts = [{"messages": messages, "answer": answer} for messages, answer in zip(asked, answers)]
        for kind, rows in (("talks", talks), ("prompts", prompts)):
            (folder / f"{name}.{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_file(folder: Path, kind: str, base: Path, **sections: Any) -> Path:
    """Writes the run file of one stage."""
    tree = {
        "run_dir": str(folder / kind),
        "device": "cpu",
        "method": {"kind": kind},
        "checkpoint": {"load": str(base)},
        "adapter": ADAPTER,
        "data": {"seq_length_tokens": 256},
        "chat": {"train": [str(folder / ("train.talks.jsonl" if kind == "sft" else "train.prompts.jsonl"))]},
        "train": {"precision": "fp32"},
        "log": {"tensorboard": False, "plots": False},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def command(*arguments: str) -> float:
    """Runs one of our commands; processor-seconds of it and its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "llm_parallel.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def share_right(model: Path, folder: Path, temperature: float) -> float:
    """Share of the held-out sums that a model answers right, in the form that was asked for, and ends by itself."""
    prompts, answers = folder / "held.prompts.jsonl", folder / f"{model.name}.answers.{temperature:g}.jsonl"
    answers.unlink(missing_ok=True)
    limit = ("--max-new-tokens", str(ANSWER_TOKENS), "--temperature", f"{temperature:g}")
    command("generate", str(model), "--input", str(prompts), "--output", str(answers), *limit)
    right = [json.loads(line)["answer"] for line in prompts.open()]
    found = [json.loads(line) for line in answers.open()]
    assert len(found) == len(right)
    return sum(line["reason"] == "stop" and line["text"].strip() == answer for line, answer in zip(found, right)) / len(
        right
    )


def stage(name: str, model: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """What a stage reached, printed."""
    row = {"stage": name, "processor_s": round(seconds, 1)}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        row[kind] = share_right(model, folder, temperature)
    error = math.sqrt(row["sampled"] * (1 - row["sampled"]) / NUM_HELD_OUT)
    print(
        f"{name}: greedy {row['greedy']:.3f}, sampled {row['sampled']:.3f} (standard error {error:.3f}), "
        f"{seconds:.0f} processor-s",
        flush=True,
    )
    return row


def measure(base: Path, folder: Path, methods: list[str], rounds: int, lr: float) -> list[dict[str, Any]]:
    """Fine-tunes, then each method from the fine-tuned model, with the share of right sums after each."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder)
    train = {"global_batch_size": 4, "micro_batch_size": 4, "steps": 12}
    optim = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 4, "weight_decay": 0.0}
    spent = command("sft", str(run_file(folder, "sft", base, train=train, optim=optim)))
    tuned = folder / "sft-merged"
    command("convert", str(folder / "sft"), str(tuned), "--merge")
    rows = [stage("sft", tuned, folder, spent)]
    judges = [{"kind": "exact"}]
    rollout = {
        "prompts": 16,
        "answers": 8,
        "max_new_tokens": ANSWER_TOKENS,
        "judges": judges,
        "held_out_interval": None,
    }
    for kind in methods:
        method: dict[str, Any] = {"rollout": rollout}
        if kind == REJECT:
            method["reject"] = {"keep": "above", "least_score": 1}
        train = {"global_batch_size": 128, "micro_batch_size": 4, "steps": rounds}
        optim = {"lr": lr, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
        path = run_file(folder, kind, tuned, method=method, train=train, optim=optim)
        spent = command("prefer", str(path))
        rows.append(stage(kind, folder / kind, folder, spent))
    return rows


def main() -> None:
    """Runs the stages, and writes what they reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[REJECT, GRPO])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = measure(asked.model.resolve(), asked.folder.resolve(), asked.methods, asked.rounds, asked.lr)
    if asked.out:
        asked.out.write_text(json.dumps({**measured_on(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
