"""Methods make a model that is right in two or three of ten answers right in most: the task of four digits."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml

from tests.integration.test_sft import answered, write_run
from tests.support import four_digits
from tests.support.commands import train_in_ranks
from tests.support.harness import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
SEEDS, PROMPTS, SAMPLES = (0, 1, 2), 640, 4
WANTED = {"dpo": 0.65, "kto": 0.85, "rrhf": 0.85}
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"train": {"epochs": 2}, "optim": {"lr": 1e-3, "min_lr": 1e-4}},
    "kto": {"train": {"epochs": 5}, "optim": {"lr": 1e-3, "min_lr": 1e-5}},
    "rrhf": {"train": {"epochs": 2}, "optim": {"lr": 1e-3, "min_lr": 1e-4}},
}
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers as its annotators do."""
    folder = tmp_path_factory.mktemp("sft")
    four_digits.write_conversations(folder / "train.jsonl", 46000)
    settings = {"steps": 360, "global_batch_size": 13, "micro_batch_size": 13}
    train_in_ranks(write_run(folder, train=settings, optim={"warmup_steps": 20}), 1)
    return folder / "run"


def sampled(rank: int, world_size: int, run_dir: str, folder: str, seed: int) -> dict[str, str]:
    """Files of the answers that the model samples, judged."""
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


def trained(rank: int, world_size: int, run_file: str) -> float:
    """Processor seconds of a run in this process."""
    from llm_parallel.config.load import load_config
    from llm_parallel.train.loop import run_training
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.tune.methods import method_of

    started = time.process_time()
    config = preflight(load_config(run_file, [], notice=lambda _: None), world_size)
    run_training(config, Place(rank, world_size, rank), method=method_of(config))
    return time.process_time() - started


SHORT_OF_IT = (
    "0.838, standard error 0.152: seeds 0 and 2 reach 0.985 and 0.995, and seed 1 stays at 0.535; with 2 epochs at the "
    "same rate 0.807 (0.108), with 3 epochs at half of it 0.772 (0.055)"
)
"""What KTO reaches from answers that were all sampled before the first step."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.xfail(reason=SHORT_OF_IT) if kind == "kto" else []) for kind in WANTED],
)
def test_a_method_lifts_sampled_accuracy(kind: str, tuned: Path, tmp_path: Path) -> None:
    _, before = run_ranks(answered, 1, str(tuned))[0]
    assert before < 0.45
    found: dict[str, list[float]] = {}
    for name, processes, layout in (("one process", 1, {}), ("TP2 PP2", 4, {"tp": 2, "pp": 2})):
        for seed in SEEDS:
            folder = tmp_path / f"{processes}-{seed}"
            folder.mkdir()
            files = run_ranks(sampled, 1, str(tuned), str(folder), seed)[0]
            tree: dict[str, Any] = {
                "run_dir": str(folder / "run"), "device": "cpu", "seed": seed, "method": {"kind": kind},
                "checkpoint": {"load": str(tuned)}, "parallel": layout, "data": {"seq_length_tokens": 210},
                "chat": {"train": [files[kind]], "eval_fraction": 0.0},
                "train": {"global_batch_size": 8, "micro_batch_size": 8, "threads_per_process": 1}
                | SETTINGS[kind]["train"],
                "optim": {"schedule": "linear", "warmup_steps": 2, "weight_decay": 0.0} | SETTINGS[kind]["optim"],
                "log": {"tensorboard": False, "plots": False},
            }  # fmt: skip
            (folder / "run.yaml").write_text(yaml.safe_dump(tree))
            seconds = run_ranks(trained, processes, str(folder / "run.yaml"))
            assert max(seconds) < LIMIT_S
            _, right = run_ranks(answered, 1, str(folder / "run"))[0]
            found.setdefault(name, []).append(right)
        shares = found[name]
        print(
            f"| {kind} | {name} | {before:.3f} | {mean(shares):.3f} | {stdev(shares) / len(shares) ** 0.5:.3f} | "
            f"{', '.join(f'{share:.3f}' for share in shares)} | {sum(seconds):.1f} |"
        )
        assert mean(shares) >= WANTED[kind], (kind, name, shares)
