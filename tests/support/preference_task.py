"""The four-digit task as a measure of methods that learn from preferences and rewards: from a model that answers as
its annotators do, right in two or three of ten answers, to one that is right in most."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tests.support import four_digits
from tests.support.commands import train_in_ranks
from tests.support.harness import run_ranks

HELD_OUT, PROMPTS, SAMPLES = 200, 1280, 4
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {"one process": (1, {}), "TP2 PP2": (4, {"tp": 2, "pp": 2})}


@dataclass(frozen=True)
class Setting:
    """How a method is run on the task: sections of its run file, and the share of right answers that it should reach.
    prompts: questions that the model answers while it is trained; 0: it answers none."""

    wanted: float
    prompts: int
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        """Whether the model answers while it is trained."""
        return self.prompts > 0


def _in_rounds(
    kind: str, rollout: dict[str, int], batch: int, steps: int, optim: dict[str, Any], **method: Any
) -> Setting:
    """A method in rounds; the rest of ``method`` stands in its section of that name."""
    judged = {
        "max_new_tokens": 6,
        "max_running": 512,
        "judges": [{"kind": "exact"}],
        "held_out_interval": None,
        "show": 0,
    }
    sections: dict[str, dict[str, Any]] = {
        "method": {"kind": kind, "rollout": rollout | judged, **method},
        "data": {"seq_length_tokens": 208},
        "train": {"global_batch_size": batch, "micro_batch_size": batch // 8, "steps": steps},
        "optim": {"lr": 1e-3, "schedule": "constant"} | optim,
    }
    steps_of_round = rollout["prompts"] * rollout["answers"] * rollout["epochs"] // batch
    return Setting(0.9, steps // steps_of_round * rollout["prompts"], sections)


def _in_files(kind: str, wanted: float, train: dict[str, Any], optim: dict[str, Any], **method: Any) -> Setting:
    """A method of answers that were all sampled and judged before its first step."""
    sections: dict[str, dict[str, Any]] = {
        "method": {"kind": kind, **method},
        "data": {"seq_length_tokens": 210},
        "train": {"global_batch_size": 8, "micro_batch_size": 8} | train,
        "optim": {"schedule": "linear", "warmup_steps": 2} | optim,
    }
    return Setting(wanted, 0, sections)


SETTINGS = {
    "dpo": _in_files("dpo", 0.65, {"epochs": 3}, {"lr": 1e-3, "min_lr": 3e-5}, dpo={"beta": 0.5}),
    "kto": _in_files(
        "kto",
        0.85,
        {"epochs": 5, "global_batch_size": 32, "micro_batch_size": 32},
        {"lr": 1.5e-3, "min_lr": 4e-5},
    ),
    "rrhf": _in_files("rrhf", 0.85, {"epochs": 2}, {"lr": 5e-4, "min_lr": 5e-5}),
    "reject": _in_rounds(
        "reject", {"prompts": 128, "answers": 4, "epochs": 2}, 32, 128, {}, reject={"keep": "above", "least_score": 1.0}
    ),
    "grpo": _in_rounds(
        "grpo",
        {"prompts": 64, "answers": 8, "epochs": 2},
        128,
        96,
        {"lr": 2e-3, "schedule": "linear", "min_lr": 2e-4},
    ),
    "ppo": _in_rounds(
        "ppo",
        {"prompts": 256, "answers": 2, "epochs": 2},
        256,
        32,
        {"lr": 3e-3, "schedule": "linear", "min_lr": 3e-4},
    ),
}


def write_sft(folder: Path) -> Path:
    """The run file of the model that the methods begin with; folder/run is its run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    four_digits.write_conversations(folder / "train.jsonl", 46000)
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"), "device": "cpu", "method": {"kind": "sft"}, "model": four_digits.MODEL,
        "data": {"tokenizer": str(four_digits.write_tokenizer(folder / "tokenizer")), "seq_length_tokens": 208},
        "chat": {"train": [str(folder / "train.jsonl")], "eval_fraction": 0.02, "show_answers": 0},
        "train": {"steps": 360, "global_batch_size": 13, "micro_batch_size": 13, "eval_samples": 8,
                  "threads_per_process": 1},
        "optim": {"lr": 5e-3, "min_lr": 5e-4, "schedule": "linear", "warmup_steps": 20, "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def sampled(rank: int, world_size: int, run_dir: str, folder: str, seed: int) -> dict[str, str]:
    """Files of the answers that a model samples to questions for training, judged."""
    from llm_parallel.generate.decode import generate
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.sampling import Sampling

    asked = list(islice(four_digits.problems(50_000 + seed), PROMPTS))
    prompts = [four_digits.prompt_tokens(a, b) for a, b in asked for _ in range(SAMPLES)]
    loaded = load_model(run_dir, device="cpu")
    wanted = Sampling(max_new_tokens=four_digits.ANSWER_TOKENS, temperature=1.0, seed=seed)
    found = generate(loaded.network, prompts, wanted, {four_digits.END})
    assert loaded.tokenizer is not None
    texts = [loaded.tokenizer.decode(tokens) for tokens in found]
    answers = [texts[at : at + SAMPLES] for at in range(0, len(texts), SAMPLES)]
    return {kind: str(path) for kind, path in four_digits.write_ranked(Path(folder), asked, answers).items()}


def right_share(rank: int, world_size: int, run_dir: str) -> float:
    """Share of held-out questions whose sampled answer is right and stops."""
    from llm_parallel.generate.decode import generate
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.sampling import Sampling

    asked = list(islice(four_digits.problems(99, held_out=True), HELD_OUT))
    prompts = [four_digits.prompt_tokens(a, b) for a, b in asked]
    sampling = Sampling(max_new_tokens=four_digits.ANSWER_TOKENS, temperature=1.0, seed=5)
    loaded = load_model(run_dir, device="cpu")
    found = generate(loaded.network, prompts, sampling, {four_digits.END})
    assert loaded.tokenizer is not None
    texts = [loaded.tokenizer.decode(tokens) for tokens in found]
    return sum(text == four_digits.right_answer(a, b) for text, (a, b) in zip(texts, asked)) / HELD_OUT


def write_prompts(path: Path, count: int, seed: int) -> Path:
    """Questions for training, with their right answers."""
    asked = islice(four_digits.problems(70_000 + seed), count)
    lines = ({"prompt": four_digits.question(a, b), "answer": four_digits.right_answer(a, b)} for a, b in asked)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trained(rank: int, world_size: int, run_file: str) -> float:
    """Processor-seconds of a run in this process."""
    from llm_parallel.config.load import load_config
    from llm_parallel.train.loop import run_training
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.tune.methods import method_of

    started = time.process_time()
    config = preflight(load_config(run_file, [], notice=lambda _: None), world_size)
    run_training(config, Place(rank, world_size, rank), method=method_of(config))
    return time.process_time() - started


def tune(
    kind: str, setting: Setting, layout: str, seed: int, tuned: Path, folder: Path
) -> tuple[float, Sequence[float]]:
    """Trains by a method from the model in ``tuned``. Returns the share of right answers, and each process's
    processor-seconds; answers in files are sampled before, which does not count."""
    processes, parallel = LAYOUTS[layout]
    folder.mkdir(parents=True)
    if setting.online:
        data = str(write_prompts(folder / "prompts.jsonl", setting.prompts, seed))
    else:
        data = run_ranks(sampled, 1, str(tuned), str(folder), seed)[0][kind]
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"), "device": "cpu", "seed": seed, "checkpoint": {"load": str(tuned)},
        "parallel": parallel, "chat": {"train": [data], "eval_fraction": 0.0},
        "log": {"tensorboard": False, "plots": False}, **setting.sections,
    }  # fmt: skip
    tree["train"] = {"threads_per_process": 1} | tree["train"]
    tree["optim"] = {"weight_decay": 0.0} | tree["optim"]
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    seconds = run_ranks(trained, processes, str(folder / "run.yaml"), timeout_s=1800.0)
    return run_ranks(right_share, 1, str(folder / "run"))[0], seconds


def fine_tuned(folder: Path) -> tuple[Path, float]:
    """The run folder of the model that the methods begin with, trained unless it is there; and its share of right
    answers."""
    if not (folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
        train_in_ranks(write_sft(folder), 1, timeout_s=1800.0)
    return folder / "run", run_ranks(right_share, 1, str(folder / "run"))[0]
