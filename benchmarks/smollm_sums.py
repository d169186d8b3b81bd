"""SmolLM2-135M learns to add by LoRA: fine-tuning teaches the form of an answer, then rejection sampling and GRPO raise
how many sums of 200 held-out prompts are right. Every stage is the command that a user would run.

    python benchmarks/smollm_sums.py MODEL_FOLDER --folder /tmp/sums --out benchmarks/results/smollm_sums.json

MODEL_FOLDER is a Hugging Face folder with a chat template; ``tests/support/smollm.py`` makes that of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured_on import measured_on

LARGEST = 40
NUM_HELD_OUT = 200
ANSWER_TOKENS = 8
SAMPLES = 4
"""Sampled answers to each held-out sum, for a smaller standard error."""
ADAPTER = {"rank": 16, "alpha": 32}
WARMUP_STEPS = 4
OPTIM = {"schedule": "constant", "warmup_steps": WARMUP_STEPS, "weight_decay": 0.0}
SFT_STEPS = 7
"""Of one row each, about 75 conversations in all: enough for the form of an answer. More of them make the model so sure
of its answers that eight of them are often one and the same, of which no method in rounds learns anything."""
LENGTH = 272
"""Tokens of a row: room for eleven sums."""
ROLLOUT = {"prompts": 22, "answers": 8}
BATCH = 44
"""Answers of a step: four rows, and four steps a round."""
RECIPES: dict[str, dict[str, Any]] = {
    "reject": {"lr": 3e-4, "rounds": 12, "method": {"reject": {"keep": "above", "least_score": 1}}},
    "grpo": {"lr": 1e-4, "rounds": 16, "method": {}},
}


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
        "data": {"seq_length_tokens": LENGTH},
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


def right_answers(model: Path, folder: Path, temperature: float, samples: int) -> list[float]:
    """Of each held-out sum, the share of a model's answers that are right, in the form that was asked for, and ended by
    the model."""
    prompts, answers = folder / "held.prompts.jsonl", folder / f"{model.name}.answers.{temperature:g}.jsonl"
    answers.unlink(missing_ok=True)
    drawn = ("--temperature", f"{temperature:g}", "--samples", str(samples), "--max-new-tokens", str(ANSWER_TOKENS))
    command("generate", str(model), "--input", str(prompts), "--output", str(answers), *drawn)
    wanted = [json.loads(line)["answer"] for line in prompts.open()]
    found = [0] * len(wanted)
    for line in map(json.loads, answers.open()):
        found[line["number"]] += line["reason"] == "stop" and line["text"].strip() == wanted[line["number"]]
    return [number / samples for number in found]


def stage(name: str, folder: Path, run: Path) -> dict[str, Any]:
    """Trains, unless an earlier call for the same folder did; what that reached, printed."""
    kept = folder / f"{name}.json"
    if not kept.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        seconds = command("sft" if name == "sft" else "prefer", str(run))
        row: dict[str, Any] = {"stage": name, "processor_s": round(seconds, 1)}
        sampled = right_answers(folder / name, folder, 1.0, SAMPLES)
        row |= {"greedy": mean(right_answers(folder / name, folder, 0.0, 1)), "sampled": mean(sampled)}
        row["standard_error"] = round(stdev(sampled) / NUM_HELD_OUT**0.5, 3)
        kept.write_text(json.dumps(row | {"rewards": rewards(folder / name)}))
    row = json.loads(kept.read_text())
    print(json.dumps(row), flush=True)
    return row


def measure(base: Path, folder: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tunes, then goes on from the fine-tuned adapters with each method, with the share of right sums of each."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder)
    train = {"global_batch_size": 1, "micro_batch_size": 1, "steps": asked.sft_steps}
    optim = OPTIM | {"lr": 1e-3}
    rows = [stage("sft", folder, run_file(folder, "sft", base, train=train, optim=optim))]
    for kind in asked.methods:
        recipe = RECIPES[kind]
        judged = {"max_new_tokens": ANSWER_TOKENS, "judges": [{"kind": "exact"}], "held_out_interval": None}
        steps = (asked.rounds or recipe["rounds"]) * ROLLOUT["prompts"] * ROLLOUT["answers"] // BATCH
        run = run_file(
            folder,
            kind,
            base,
            method=recipe["method"] | {"rollout": ROLLOUT | judged},
            train={"global_batch_size": BATCH, "micro_batch_size": 1, "steps": steps},
            optim=OPTIM | {"lr": asked.lr or recipe["lr"]},
            adapter={"load": str(folder / "sft")},
        )
        rows.append(stage(kind, folder, run))
    return rows


def rewards(run: Path) -> list[float]:
    """Share of right sampled answers of each round, before its steps."""
    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    return [round(event["reward"], 3) for event in events if event["event"] == "round"]


def main() -> None:
    """Runs the stages, and writes what they reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = measure(asked.model.resolve(), asked.folder.resolve(), asked)
    if asked.out:
        recipe = {"rollout": ROLLOUT, "answers_of_a_step": BATCH, "methods": RECIPES}
        asked.out.write_text(json.dumps({**measured_on(), "recipe": recipe, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
