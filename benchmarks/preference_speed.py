"""Processor time of DPO and GRPO, ours against TRL's trainers: the same weights, conversations and batch, one thread.

    python benchmarks/preference_speed.py --rounds 3 --out benchmarks/results/preference_speed.json

A step's time is the slope between a short and a long run of each, processes, files and scoring included, so that what
happens once a run does not count. Runs of both take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measured_on import measured_on  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAIRS, PROMPTS, ANSWERS, ANSWER_TOKENS, LENGTH = 8, 4, 8, 64, 256
LR = 1e-5
STEPS = {"dpo": (2, 8), "grpo": (2, 6)}


def write_model(folder: Path) -> Path:
    """The 17 M parameter model of ``configs/bench-17m.yaml`` with random weights, a tokenizer of this repository's text
    and a ChatML template, as a Hugging Face folder."""
    import torch
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings = yaml.safe_load((ROOT / "configs/bench-17m.yaml").read_text())["model"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(
        [str(ROOT / "DECISIONS.md"), str(ROOT / "CONTRIBUTING.md"), str(ROOT / "README.md")],
        vocab_size=settings["vocab_size"], special_tokens=list(SPECIAL), show_progress=False,
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings["vocab_size"], hidden_size=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"], num_hidden_layers=settings["num_layers"],
        num_attention_heads=settings["num_attention_heads"], num_key_value_heads=settings["num_query_groups"],
        max_position_embeddings=1024, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def write_data(folder: Path, steps: int) -> None:
    """Pairs and prompts for a number of steps, out of this repository's text; answers differ in length."""
    words, draw = (ROOT / "DECISIONS.md").read_text().split(), random.Random(0)

    def text(low: int, high: int) -> str:
        first, number = draw.randrange(len(words) - high), draw.randint(low, high)
        return " ".join(words[first : first + number])

    def said(role: str, low: int, high: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(low, high)}]

    pairs = [
        {"prompt": said("user", 5, 40), "chosen": said("assistant", 5, 80), "rejected": said("assistant", 5, 80)}
        for _ in range(steps * PAIRS)
    ]
    prompts = [{"prompt": said("user", 5, 40)} for _ in range(steps * PROMPTS)]
    for name, rows in (("dpo", pairs), ("grpo", prompts)):
        (folder / f"{name}.{steps}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_ours(folder: Path, kind: str, steps: int) -> list[str]:
    """The command of our run."""
    name = f"{kind}-ours-{steps}"
    subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    method: dict[str, Any] = {"kind": kind}
    batch = PAIRS
    if kind == "grpo":
        judges = [{"kind": "length", "max_tokens": 1}]
        method["rollout"] = {
            "prompts": PROMPTS, "answers": ANSWERS, "max_new_tokens": ANSWER_TOKENS, "judges": judges,
            "held_out_interval": None, "unfinished_score": None, "show": 0,
        }  # fmt: skip
        batch = PROMPTS * ANSWERS
    tree = {
        "run_dir": str(folder / name),
        "device": "cpu",
        "method": method,
        "checkpoint": {"load": str(folder / "model")},
        "data": {"seq_length_tokens": LENGTH},
        "chat": {"train": [str(folder / f"{kind}.{steps}.jsonl")]},
        "train": {
            "global_batch_size": batch, "micro_batch_size": 4, "steps": steps, "precision": "fp32",
            "threads_per_process": 1,
        },
        "optim": {"lr": LR, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["-m", "llm_parallel.cli", "prefer", str(path)]


def train_theirs(folder: Path, kind: str, steps: int) -> None:
    """TRL's trainer on the same; run in a process of its own."""
    import warnings

    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = load_dataset("json", data_files=str(folder / f"{kind}.{steps}.jsonl"), split="train")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    common: dict[str, Any] = {
        "output_dir": str(folder / "theirs"), "max_steps": steps, "learning_rate": LR, "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "constant",
        "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer

        settings = DPOConfig(per_device_train_batch_size=PAIRS, max_length=LENGTH, **common)
        trainer: Any = DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    else:
        from trl import GRPOConfig, GRPOTrainer

        settings = GRPOConfig(
            per_device_train_batch_size=PROMPTS * ANSWERS, num_generations=ANSWERS, beta=0.0, temperature=1.0,
            max_completion_length=ANSWER_TOKENS, **common,
        )  # fmt: skip

        def shorter(completions: list[Any], **_: Any) -> list[float]:
            return [-float(len(one[0]["content"])) for one in completions]

        trainer = GRPOTrainer(
            model, reward_funcs=shorter, args=settings, train_dataset=data, processing_class=tokenizer
        )
    trainer.train()


def processor_seconds(arguments: list[str], log: Path) -> float:
    """Processor time of a Python process and those that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as handle:
        status = subprocess.run([sys.executable, *arguments], stdout=handle, stderr=handle, env=environment).returncode
    if status:
        sys.exit(f"{' '.join(arguments)} ended with status {status}:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(kinds: list[str], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Processor-seconds of a step, ours and theirs, for every kind."""
    write_model(folder / "model")
    found = []
    for kind in kinds:
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for steps in STEPS[kind]:
            write_data(folder, steps)
        for _ in range(rounds):
            for name, times in seconds.items():
                spent = []
                for steps in STEPS[kind]:
                    theirs = [str(Path(__file__)), "--theirs", kind, str(steps), "--folder", str(folder)]
                    arguments = run_ours(folder, kind, steps) if name == "ours" else theirs
                    spent.append(processor_seconds(arguments, folder / f"{kind}-{name}-{steps}.log"))
                times.append((spent[1] - spent[0]) / (STEPS[kind][1] - STEPS[kind][0]))
        step = {name: statistics.median(times) for name, times in seconds.items()}
        found.append(
            {"kind": kind, "processor_s_per_step": step, "all": seconds, "ratio": step["theirs"] / step["ours"]}
        )
        print(
            f"{kind}: ours {step['ours']:.2f}, TRL {step['theirs']:.2f} processor-s a step, ratio "
            f"{found[-1]['ratio']:.2f} ({', '.join(f'{one:.2f}' for one in seconds['ours'])} against "
            f"{', '.join(f'{one:.2f}' for one in seconds['theirs'])})",
            flush=True,
        )
    return found


def main() -> None:
    """Measures, and writes what was measured with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where files go; a temporary folder without it")
    parser.add_argument("--theirs", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.theirs:
        return train_theirs(asked.folder, asked.theirs[0], int(asked.theirs[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(asked.kinds, asked.rounds, folder)
    if asked.out:
        about = {**measured_on("trl"), "threads": 1, "rounds": asked.rounds}
        asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
