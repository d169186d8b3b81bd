"""Tokens per processor-second of generation, ours beside transformers.generate, on one thread.

Each contender has a process of its own, since our platform puts a mode between Python and torch that would slow the
other one down. The cases run in turns, round by round, in both; given is the median over the rounds, and the spread.
Greedy, 48 new tokens for each prompt, nothing ends earlier; prompts are part of the time. transformers gets prompts of
several lengths padded on the left.

    .venv/bin/python benchmarks/generate.py [--rounds 5] [--models 17m smollm] [--out FILE.md]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NEW = 48
CONTENDERS = ("ours", "transformers")


def cases(vocabulary: int) -> dict[str, list[list[int]]]:
    """Prompts by case. Equal and ragged ones have the same number of tokens in all."""
    import random

    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    equal = [prompt(40) for _ in range(16)]
    ragged = [prompt(8 + (64 * n) // 15) for n in range(16)]
    head = prompt(200)
    return {
        "batch 1": equal[:1],
        "batch 4": equal[:4],
        "batch 16": equal,
        "batch 16, ragged": ragged,
        "batch 16, 200 tokens shared": [head + prompt(8) for _ in range(16)],
        "16 samples of one prompt": [head] * 16,
        "the same one by one": [head],
    }


def random_17m(folder: Path) -> None:
    """The model of configs/bench-17m.yaml with random weights, as a Hugging Face folder."""
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    model = yaml.safe_load((ROOT / "configs" / "bench-17m.yaml").read_text())["model"]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_hidden_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model["num_query_groups"],
        vocab_size=model["vocab_size"],
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Ours:
    """The generator, with one process."""

    def __init__(self, folder: str) -> None:
        from llm_parallel.generate.engine import Generator, GeneratorOptions
        from llm_parallel.generate.load import load_model

        network = load_model(folder, "cpu", "fp32").network
        self.generator = Generator(network, GeneratorOptions(max_running=32, cache_tokens=16384))

    def __call__(self, name: str, prompts: list[list[int]]) -> list[list[int]]:
        from llm_parallel.generate.requests import Request
        from llm_parallel.generate.sampling import Sampling

        how = Sampling(max_new_tokens=NEW)
        self.generator.refresh()  # so that nothing is left of the round before
        if name.startswith("16 samples"):
            requests = [Request(0, tuple(prompts[0]), how, n=16)]
        else:
            requests = [Request(number, tuple(prompt), how) for number, prompt in enumerate(prompts)]
        return [list(answer.tokens) for answer in self.generator.run(requests)]


class Transformers:
    """model.generate with a static batch."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def __call__(self, name: str, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        out = self.model.generate(tokens, attention_mask=mask, **options)
        return out[:, longest:].tolist()


def work(kind: str, folder: str, pipe: Any) -> None:
    """A contender's process: measures the cases that it is sent."""
    import torch

    torch.set_num_threads(1)
    contender = {"ours": Ours, "transformers": Transformers}[kind](folder)
    pipe.send(None)
    while (sent := pipe.recv()) is not None:
        started = time.process_time()
        answers = contender(*sent)
        seconds = time.process_time() - started
        pipe.send((sum(map(len, answers)) / seconds, answers))


def measure(folder: str, vocabulary: int, rounds: int, wanted: list[str] | None) -> dict[str, dict[str, list[float]]]:
    """Tokens per processor-second of each round, by case and contender. Both must write the same."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for kind in CONTENDERS:
        pipes[kind], theirs = context.Pipe()
        context.Process(target=work, args=(kind, folder, theirs), daemon=True).start()
        pipes[kind].recv()
    found: dict[str, dict[str, list[float]]] = {}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, prompts in cases(vocabulary).items():
            if wanted and name not in wanted:
                continue
            wrote = {}
            for kind in CONTENDERS if round_ % 2 else CONTENDERS[::-1]:
                pipes[kind].send((name, prompts))
                speed, wrote[kind] = pipes[kind].recv()
                if round_:
                    found.setdefault(name, {}).setdefault(kind, []).append(speed)
            same = sum(a == b for a, b in zip(wrote["ours"], wrote["transformers"]))
            if not round_:
                print(f"{name}: {same} of {len(prompts)} answers are the same", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Median and range of each case, and the median ratio of the rounds."""
    lines = ["| case | ours | range | transformers | range | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for name, speeds in found.items():
        ours, theirs = (speeds[kind] for kind in CONTENDERS)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        cells = [f"{statistics.median(x):.1f} | {min(x):.1f} to {max(x):.1f}" for x in (ours, theirs)]
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Measures and prints, and writes a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["17m", "smollm"], choices=["17m", "smollm"])
    parser.add_argument("--cases", nargs="+", help="names of cases; all if not given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chip = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"Command: `.venv/bin/python benchmarks/generate.py {' '.join(sys.argv[1:])}`; {chip}, one thread; Python "
        f"{platform.python_version()}, {versions}; commit {commit.strip()}.",
        "",
        f"Tokens per processor-second, fp32, greedy, {NEW} new tokens a prompt, prompts included; median and range of "
        f"{options.rounds} rounds.",
    ]
    for name in options.models:
        if name == "smollm":
            from tests.support.smollm import smollm_folder

            folder = str(smollm_folder())
        else:
            folder = tempfile.mkdtemp()
            random_17m(Path(folder))
        vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        lines += ["", f"## {name}", *table(measure(folder, vocabulary, options.rounds, options.cases))]
        print("\n".join(lines), flush=True)
        if options.out:
            options.out.write_text("# Generation beside transformers\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
