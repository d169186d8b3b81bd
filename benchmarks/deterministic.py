"""The price of ``kernels.deterministic`` on a CPU: processor-seconds of generation, and of a training step's forward
and backward, with it over those without it, in one process and on one thread. The cases run in turns, round by round;
given is the median over the rounds, and the spread. How far log-probabilities of generation are from those of training
is in tests/parity/test_same_numbers.py.

    .venv/bin/python benchmarks/deterministic.py [--rounds 5] [--models 17m smollm] [--out FILE.md]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NEW, LENGTH = 32, 512


def networks(folder: str, precision: str) -> dict[bool, Any]:
    """The model without and with the mode, with the same weights."""
    from llm_parallel.config.tree import KernelsConfig, TrainConfig
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from tests.support.parity_models import our_config

    config = our_config(folder, LENGTH).model_copy(update={"train": TrainConfig(precision=precision)})
    groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu"), config.seed)
    found = {}
    for deterministic in (False, True):
        kernels = KernelsConfig(deterministic=deterministic)
        found[deterministic] = build_policy(config.model_copy(update={"kernels": kernels}), groups)
        load_hf_weights(folder, found[deterministic].models)
    return found


def cases(network: Any) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    import torch

    from llm_parallel.generate.engine import Generator, GeneratorOptions
    from llm_parallel.generate.requests import Request
    from llm_parallel.generate.sampling import Sampling

    generator = Generator(network, GeneratorOptions(max_running=32, cache_tokens=8192))
    vocabulary = network.models[0].model_config.vocab_size
    tokens = torch.randint(vocabulary, (17, LENGTH), generator=torch.Generator().manual_seed(0))
    prompts = [tuple(row[: 8 + 4 * number].tolist()) for number, row in enumerate(tokens)]

    def answer(count: int) -> None:
        generator.scheduler.start_over()
        generator.run([Request(n, prompts[n], Sampling(max_new_tokens=NEW)) for n in range(count)])

    def forward() -> Any:
        return network.chunks[0](tokens[:2], labels=tokens[:2].roll(-1, 1))

    def evaluated() -> None:
        with torch.no_grad():
            forward()

    return {
        "generation, 1 request": lambda: answer(1),
        "generation, 16 requests": lambda: answer(16),
        f"forward, 2 x {LENGTH} tokens": evaluated,
        f"forward and backward, 2 x {LENGTH} tokens": lambda: forward().mean().backward(),
    }


def work(folder: str, precision: str, rounds: int, pipe: Any) -> None:
    """Processor-seconds by case and mode."""
    import torch

    torch.set_num_threads(1)
    by_mode = {mode: cases(network) for mode, network in networks(folder, precision).items()}
    found: dict[str, dict[bool, list[float]]] = {}
    for round_ in range(rounds + 1):  # the first one warms up
        for name in by_mode[False]:
            for mode in (False, True) if round_ % 2 else (True, False):
                started = time.process_time()
                by_mode[mode][name]()
                if round_:
                    found.setdefault(name, {}).setdefault(mode, []).append(time.process_time() - started)
    pipe.send(found)


def main() -> None:
    """Measures and prints the table."""
    from benchmarks.generate import random_17m
    from tests.support.smollm import smollm_folder

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["17m", "smollm"], choices=["17m", "smollm"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    lines = [
        "| model | precision | case | seconds without | seconds with | times | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as made:
        for model in chosen.models:
            if model == "17m":
                random_17m(Path(made) / "17m")
            folder = str(Path(made) / "17m") if model == "17m" else str(smollm_folder())
            for precision in chosen.precisions:
                pipe, theirs = context.Pipe()
                context.Process(target=work, args=(folder, precision, chosen.rounds, theirs), daemon=True).start()
                for name, by_mode in pipe.recv().items():
                    without, with_ = (statistics.median(by_mode[mode]) for mode in (False, True))
                    ratios = [b / a for a, b in zip(by_mode[False], by_mode[True])]
                    cells = model, precision, name, f"{without:.2f}", f"{with_:.2f}", f"{with_ / without:.2f}"
                    lines.append(f"| {' | '.join(cells)} | {min(ratios):.2f} to {max(ratios):.2f} |")
                    print(lines[-1], flush=True)
    if chosen.out:
        chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
