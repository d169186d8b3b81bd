"""The quickstart's assistant: the pretrained model is fine-tuned on conversations, and answers questions that it has
not seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_parallel.checkpoint.folders import latest_checkpoint
from llm_parallel.config.schema import SCHEMA_LINE
from llm_parallel.config.tree import RunConfig
from llm_parallel.files import atomic_write
from llm_parallel.lines import note, say
from llm_parallel.quickstart_chat import divided, write_conversations
from llm_parallel.screen import show
from llm_parallel.worker.command import train_command

CHAT_STEPS = 430
"""Copying words is learned last. Of 200 held-out questions 190 were answered right after 700 steps of pretraining and
these, 195 after 800 and 500."""
GPU_CHAT_STEPS = 150
"""On GPUs a step has eight times as many conversations."""
SEQ_LENGTH_TOKENS = 160
"""A conversation has 37 tokens on average and 90 at most; a step of eight samples takes some 32 conversations."""
ANSWER_TOKENS = 40
NUM_QUESTIONS = 200
"""Held-out conversations; the first question of each is asked at the end."""
SHOWN_KINDS = ("module", "sort", "count")
"""Tasks of which the first held-out question is shown with its answer."""
TRY = "What is sqlite3 for?"


@dataclass(frozen=True)
class Asked:
    """A held-out question, the answer that is right, the model's, and whether it ended that itself."""

    kind: str
    question: str
    right_answer: str
    answer: str
    stopped: bool

    @property
    def is_right(self) -> bool:
        """Whether the answer is the right one, to the letter, and ended there."""
        return self.stopped and self.answer.strip() == self.right_answer


def chat_tree(folder: Path, pretrained: RunConfig, steps: int) -> dict[str, Any]:
    """The run file of the fine-tuning: model, tokenizer and weights come from the pretrained run, and so do layout,
    device and batch, so that settings with which that one ran suit this one too."""
    data, train = folder / "data", pretrained.train
    return {
        "run_dir": str(folder / "chat"),
        "device": pretrained.device,
        "method": {"kind": "sft"},
        "data": {"seq_length_tokens": SEQ_LENGTH_TOKENS},
        "chat": {
            "train": [{"path": str(data / "chat.train.jsonl")}],
            "eval": [{"path": str(data / "chat.eval.jsonl")}],
            "answer_tokens": ANSWER_TOKENS,
        },
        "parallel": pretrained.parallel.model_dump(exclude_defaults=True),
        "train": {
            "global_batch_size": train.global_batch_size,
            "micro_batch_size": train.micro_batch_size,
            "precision": train.precision,
            "steps": steps,
            "eval_interval_steps": min(100, steps),
        },
        "optim": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": min(20, steps // 4)},
        "checkpoint": {"load": pretrained.run_dir},
        "log": {"interval_steps": 10},
    }


def fine_tune(folder: Path, pretrained: RunConfig, step: int, steps: int) -> int:
    """Writes conversations and the run file, and trains ``steps`` steps, beginning with the model after ``step`` steps
    of the pretraining; returns the exit status."""
    write_conversations(folder / "data", num_held_out=NUM_QUESTIONS)
    begin_from(folder / "chat", step)
    run_file = folder / "chat.yaml"
    with atomic_write(run_file) as handle:
        handle.write(SCHEMA_LINE)
        yaml.safe_dump(chat_tree(folder, pretrained, steps), handle, sort_keys=False, allow_unicode=True)
    say(f"run file: {run_file}")
    return train_command("sft", str(run_file), ["log.plots=false"], suggest=lambda _: None)


def ask(run_dir: Path) -> list[Asked]:
    """The model's likeliest answers to the first questions of all held-out conversations."""
    from llm_parallel.data.chat_open import open_encoder
    from llm_parallel.generate.command import chat_prompts
    from llm_parallel.generate.decode import generate
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.sampling import Sampling
    from llm_parallel.parallel.groups import close_groups

    _, held_out = divided(0, NUM_QUESTIONS)
    loaded = load_model(str(run_dir))
    try:
        assert loaded.tokenizer is not None
        decode = loaded.tokenizer.decode
        encoder = open_encoder(loaded.config)
        prompts = chat_prompts(encoder, [one.turns[0] for one in held_out])
        answers = generate(loaded.network, prompts, Sampling(ANSWER_TOKENS), encoder.stops)
        return [
            Asked(one.kind, one.turns[0], one.turns[1], decode(tokens), len(tokens) < ANSWER_TOKENS)
            for one, tokens in zip(held_out, answers)
        ]
    finally:
        close_groups()


def report_answers(run_dir: Path, asked: Sequence[Asked]) -> str:
    """Prints the answers of three questions and how many of all are right, which ``summary.json`` has in full; returns
    the latter as a sentence."""
    right, stopped = sum(one.is_right for one in asked), sum(one.stopped for one in asked)
    totals, good = Counter(one.kind for one in asked), Counter(one.kind for one in asked if one.is_right)
    by_kind = {kind: [good[kind], totals[kind]] for kind in sorted(totals)}
    summary = {"questions": len(asked), "right": right, "stopped": stopped, "right_of_by_kind": by_kind}
    with atomic_write(run_dir / "summary.json") as handle:
        json.dump({**summary, "answers": [asdict(one) for one in asked]}, handle, indent=1)
    for kind in SHOWN_KINDS:
        one = next(one for one in asked if one.kind == kind)
        verdict = "right" if one.is_right else f"right would be: {one.right_answer}"
        say(f"\n  {one.question}\n    {one.answer.strip()}   ({verdict}{'' if one.stopped else '; it did not stop'})")
    said = f"{right} of {len(asked)} held-out questions right ({right / len(asked):.1%})"
    kinds = ", ".join(f"{kind} {of[0]}/{of[1]}" for kind, of in by_kind.items())
    show(f"\n{said}; {stopped} of {len(asked)} answers ended by themselves")
    show(f"by kind: {kinds}")
    show("held out: no such question is in the training conversations; right: every letter of the answer")
    return said


def begin_from(run_dir: Path, step: int) -> None:
    """Keeps the step of the pretraining from which the fine-tuning begins, and says it if one is there already that
    began from another."""
    kept = run_dir / "base.json"
    if latest_checkpoint(run_dir / "checkpoints") is None:
        with atomic_write(kept) as handle:
            json.dump({"pretraining_step": step}, handle)
        return
    begun = json.loads(kept.read_text())["pretraining_step"] if kept.is_file() else None
    if begun is not None and begun != step:
        note(
            f"{run_dir} began from step {begun} of the pretraining, which is at step {step}; remove {run_dir} to "
            "fine-tune the newer model"
        )
