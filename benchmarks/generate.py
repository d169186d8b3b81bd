"""The table of generation on a CPU: tokens per processor-second and per second, ours beside transformers, llama.cpp and
vLLM, one thread each, in one run.

Each contender has a process of its own (benchmarks/generation_peers.py). The cases run in turns, case by case in all
contenders and round by round, so that what else the machine does meets all of them; given is the median over the
rounds. Processor time is that of all threads of the contender's process and of those that it starts. Greedy, nothing
ends earlier; prompts are part of the time. Rounds are made as long as there is time for one more.

    .venv/bin/python benchmarks/generate.py [--quick] [--minutes 11] [--models 17m smollm] [--out FILE.md]
        [--llama-python PYTHON] [--vllm-python PYTHON]

llama.cpp needs ``pip install xllamacpp``, in the environment of this file or in that of --llama-python; it answers for
SmolLM2-135M, whose file in its format the package ships. A contender that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measured_on import sentence  # noqa: E402

OURS = ("ours-fp32", "ours-bf16", "ours-int8", "ours-int4")
PEERS = ("transformers-fp32", "transformers-bf16", "llama.cpp", "vllm-bf16")
QUICK = ("ours-fp32", "ours-int4", "transformers-fp32", "llama.cpp")
QUICK_CASES = ("batch 1", "batch 16", "batch 16, ragged", "16 samples of one prompt", "one sample of it")
Case = dict[str, Any]


def cases(vocabulary: int, new: int) -> dict[str, Case]:
    """Prompts by case. Equal and ragged ones have the same number of tokens in all."""
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    equal = [prompt(40) for _ in range(32)]
    ragged = [prompt(8 + (64 * n) // 15) for n in range(16)]
    head = prompt(200)
    shared = [head + prompt(8) for _ in range(16)]
    found: dict[str, Case] = {f"batch {n}": {"prompts": equal[:n]} for n in (1, 4, 16, 32)}
    found["batch 16, ragged"] = {"prompts": ragged}
    found["batch 16, 200 tokens shared"] = {"prompts": shared, "shares": True}
    found["16 samples of one prompt"] = {"prompts": [head], "samples": 16, "shares": True}
    found["one sample of it"] = {"prompts": [head]}
    return {name: {"samples": 1, "shares": False, "new": new, **case} for name, case in found.items()}


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


class Contender:
    """A contender's process."""

    def __init__(self, kind: str, python: str, folder: str, gguf: str | None, log: Path) -> None:
        command = [python, str(ROOT / "benchmarks" / "generation_peers.py"), kind, folder, *([gguf] if gguf else [])]
        self._errors = log.open("w")
        self._log = log
        pipe = subprocess.PIPE
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment
        )
        self._seen = psutil.Process(self._process.pid)

    def wait(self) -> str | None:
        """Until it is ready; or why it never will be."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() == "ready":
            return None
        return (self._log.read_text().strip().splitlines() or ["it ended without a word"])[-1][:160]

    def _processor_s(self) -> float:
        """Processor time of all threads, also of those that have ended, by the clocks of the processes."""
        pids = [self._seen.pid, *(child.pid for child in self._seen.children(recursive=True))]
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)

    def answer(self, case: Case) -> tuple[dict[str, Any], float, float]:
        """(What it answers, processor-seconds, seconds.)"""
        assert self._process.stdin is not None and self._process.stdout is not None
        used, began = self._processor_s(), time.perf_counter()
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        seconds = time.perf_counter() - began
        if not line:
            raise RuntimeError(f"a contender ended: {self._log.read_text()[-2000:]}")
        return json.loads(line), self._processor_s() - used, seconds

    def end(self) -> None:
        """Closes its input, at which it ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._errors.close()


@dataclass
class Found:
    """speeds: tokens per processor-second and per second of each round, by case and contender; cache: mean and largest
    of bytes of pages over those of tokens; same: answers that are transformers' in fp32, of how many."""

    speeds: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    cache: dict[str, tuple[float, float]] = field(default_factory=dict)
    same: dict[str, tuple[int, int]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rounds: int = 0

    def speed(self, case: str, kind: str) -> list[float]:
        """Tokens per processor-second, one for each round."""
        return [of_processor for of_processor, _ in self.speeds.get(case, {}).get(kind, [])]

    def ratio(self, case: str, kind: str, other_case: str, other: str) -> float | None:
        """Median over the rounds of one speed over another."""
        ours, theirs = self.speed(case, kind), self.speed(other_case, other)
        return statistics.median(a / b for a, b in zip(ours, theirs)) if ours and theirs else None


def measure(contenders: Mapping[str, Contender], wanted: Mapping[str, Case], rounds: int, seconds: float) -> Found:
    """One round to warm up, in which answers and the cache are looked at, then as many as fit into the seconds."""
    found, began, longest = Found(), time.monotonic(), 0.0
    looked_at = next((kind for kind in contenders if kind in OURS), None)
    for name, case in wanted.items():
        short = {**case, "new": min(case["new"], 16), "prompts": case["prompts"][:16]}
        wrote = {}
        for kind, contender in contenders.items():
            said, *_ = contender.answer({**short, "look": kind == looked_at})
            wrote[kind] = said["answers"]
            if said["cache"]:
                found.cache[name] = tuple(said["cache"])
        if "ours-fp32" in wrote and "transformers-fp32" in wrote:
            pairs = list(zip(wrote["ours-fp32"], wrote["transformers-fp32"]))
            found.same[name] = sum(a == b for a, b in pairs), len(pairs)
    while found.rounds < rounds and (not found.rounds or time.monotonic() - began + longest < seconds):
        started = time.monotonic()
        for name, case in wanted.items():
            kinds = list(contenders)[:: -1 if found.rounds % 2 else 1]
            for kind in kinds:
                said, used, took = contenders[kind].answer(case)
                by_kind = found.speeds.setdefault(name, {})
                by_kind.setdefault(kind, []).append((said["tokens"] / used, said["tokens"] / took))
        longest = max(longest, time.monotonic() - started)
        found.rounds += 1
        print(f"round {found.rounds} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def tables(found: Found, kinds: Sequence[str]) -> list[str]:
    """Medians of processor time with their range, then of time."""
    lines = []
    for title, place in (("Tokens per processor-second (range)", 0), ("Tokens per second", 1)):
        lines += ["", title + ":", "", f"| case | {' | '.join(kinds)} |", f"| --- |{' ---: |' * len(kinds)}"]
        for name, by_kind in found.speeds.items():
            cells = []
            for kind in kinds:
                numbers = [both[place] for both in by_kind[kind]]
                spread = f" ({min(numbers):.0f} to {max(numbers):.0f})" if place == 0 and len(numbers) > 1 else ""
                cells.append(f"{statistics.median(numbers):.1f}{spread}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def goals(found: Found) -> list[str]:
    """What issue 21 asks for, with what was found."""
    rows: list[tuple[str, float | None, float]] = []
    for case, least in (("batch 1", 1.3), ("batch 16", 1.3)):
        rows.append(
            (f"fp32 over transformers, {case}", found.ratio(case, "ours-fp32", case, "transformers-fp32"), least)
        )
    for case, least in (("batch 1", 1.0), ("batch 16", 3.0)):
        rows.append((f"int4 over llama.cpp, {case}", found.ratio(case, "ours-int4", case, "llama.cpp"), least))
    for kind in OURS:
        rows.append((f"{kind}: ragged over equal", found.ratio("batch 16, ragged", kind, "batch 16", kind), 0.85))
        together = found.ratio("16 samples of one prompt", kind, "one sample of it", kind)
        rows.append((f"{kind}: 16 samples of a prompt over one by one", together, 5.0))
    lines = ["", "| ratio of tokens per processor-second | found | goal | |", "| --- | ---: | ---: | --- |"]
    for name, ratio, least in rows:
        if ratio is not None:
            lines.append(f"| {name} | {ratio:.2f} | {least:.2f} | {'reached' if ratio >= least else 'missed'} |")
    lines += ["", "| case | bytes of pages over those of tokens: mean | largest | answers as transformers' (fp32) |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, (mean, largest) in found.cache.items():
        same = "{} of {}".format(*found.same[name]) if name in found.same else "·"
        lines.append(f"| {name} | {mean:.2f} | {largest:.2f} | {same} |")
    return lines


def opened(kinds: Sequence[str], folder: str, gguf: str | None, options: Any, logs: Path, found: dict[str, str]) -> Any:
    """Contenders that are there, by kind. ``found`` takes why the others are not."""
    pythons = {"llama.cpp": options.llama_python, "vllm-bf16": options.vllm_python}
    started = {}
    for kind in kinds:
        if kind == "llama.cpp" and gguf is None:
            continue
        started[kind] = Contender(kind, pythons.get(kind) or sys.executable, folder, gguf, logs / f"{kind}.log")
    ready = {}
    for kind, contender in started.items():
        reason = contender.wait()
        if reason is None:
            ready[kind] = contender
        else:
            found[kind] = reason
    return ready


def model_folder(name: str, made: Path) -> tuple[str, str | None]:
    """The Hugging Face folder of a model, and the file for llama.cpp if there is one."""
    if name == "17m":
        random_17m(made)
        return str(made), None
    from tests.support.smollm import fetch, smollm_folder

    folder = smollm_folder()
    return str(folder), str(fetch(folder.parent))


def heading(options: Any, new: int) -> list[str]:
    """What was run, where."""
    from llm_parallel.generate.extension import level

    return [
        "# Generation beside its peers",
        "",
        f"{sentence('transformers')} One thread each; our extension: {level()}.",
        "",
        f"Greedy, {new} new tokens a prompt, prompts included; contenders take turns by case; medians over the rounds.",
    ]


def main() -> None:
    """Measures and prints, and writes a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases and contenders, in under 3 minutes")
    parser.add_argument("--minutes", type=float, help="for all; 11 if not given, 2.5 with --quick")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--models", nargs="+", default=["17m", "smollm"], choices=["17m", "smollm"])
    parser.add_argument("--kinds", nargs="+", default=None, choices=[*OURS, *PEERS])
    parser.add_argument("--llama-python", help="the Python that has xllamacpp, if this one has not")
    parser.add_argument("--vllm-python", help="the Python that has vLLM's build for CPUs, if this one has not")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, minutes = time.monotonic(), options.minutes or (2.5 if options.quick else 11.0)
    new = 16 if options.quick else 32
    lines, logs = heading(options, new), Path(tempfile.mkdtemp())
    for number, name in enumerate(options.models):
        folder, gguf = model_folder(name, logs / name)
        vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        wanted = cases(vocabulary, new)
        if options.quick:
            wanted = {case: wanted[case] for case in QUICK_CASES}
        absent: dict[str, str] = {}
        kinds = options.kinds or (QUICK if options.quick else (*OURS, *PEERS))
        contenders = opened(kinds, folder, gguf, options, logs, absent)
        left = 60 * minutes - (time.monotonic() - began)
        share = left / 5 if name == "17m" and number + 1 < len(options.models) else left
        found = measure(contenders, wanted, options.rounds, share)
        for contender in contenders.values():
            contender.end()
        lines += ["", f"## {name}, {found.rounds} rounds", *tables(found, list(contenders)), *goals(found)]
        lines += ["", *(f"- {kind} did not run: {reason}" for kind, reason in absent.items())]
        text = "\n".join(lines) + f"\n\nThe whole run took {time.monotonic() - began:.0f} s.\n"
        if options.out:
            options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
