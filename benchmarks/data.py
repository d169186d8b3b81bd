"""Measures the preparation of text and the indexing of samples, each in turns with a peer.

    python benchmarks/data.py [--rounds 3] [--megabytes 55] [--samples 100000000] [--save]

tokens: ``prepare`` with two processes, from files on disk to .bin/.idx, against sentencepiece's own batch encode with
two threads, which has the text in memory already and writes nothing. Text: Python source of this machine.
index: an epoch of ``--samples`` samples of 2048 tokens over documents of 1000 tokens on average, ready to be asked for
any sample, against what megatron-core's GPTDataset builds for the same: its C++ sample index, and the shuffled lists of
documents and of samples around it. Every build runs in a fresh process, whose peak memory beyond the document lengths,
which both need, is given. The contenders take turns, in rotated order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 2048
MEAN_DOCUMENT = 1000
VOCABULARY = 8192
LOOKUPS = 2000
THREADS = 2


@dataclass
class Measured:
    """One build of an index: seconds of its parts, their sum being the build; bytes kept; bytes of peak memory; and
    microseconds to find the documents of a random sample."""

    parts: dict[str, float]
    kept: int
    peak: int
    lookup_us: float


def real_text(megabytes: int) -> list[Path]:
    """Python source files of this machine, the standard library first, up to ``megabytes`` in all."""
    found, size = [], 0
    paths = sysconfig.get_paths()
    for folder in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                content = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if content and path not in found[-1:]:
                found.append(path)
                size += path.stat().st_size
            if size > megabytes * 1e6:
                return found
    return found


def measure_tokens(rounds: int, megabytes: int) -> dict[str, Any]:
    """Tokens per second of both programs, and their ratio in each round."""
    from sentencepiece import SentencePieceProcessor

    from llm_parallel.data.prepare import PrepareConfig, prepare
    from llm_parallel.data.vocabulary import vocabulary_from_files

    files = list(dict.fromkeys(path.resolve() for path in real_text(megabytes)))
    texts = [path.read_bytes().decode("utf-8-sig") for path in files]
    with tempfile.TemporaryDirectory() as folder:
        model = vocabulary_from_files(files, VOCABULARY, folder, prefixes=[])
        processor = SentencePieceProcessor(model_file=str(model))

        def ours(number: int) -> tuple[int, float]:
            started = time.perf_counter()
            config = PrepareConfig(
                tuple(map(str, files)), f"{folder}/out{number}", str(model), workers=THREADS, append_eod=False
            )
            return prepare(config).tokens, time.perf_counter() - started

        def theirs(_: int) -> tuple[int, float]:
            started = time.perf_counter()
            encoded = processor.encode(texts, num_threads=THREADS)
            seconds = time.perf_counter() - started
            return sum(map(len, encoded)), seconds

        contenders: dict[str, Callable[[int], tuple[int, float]]] = {"prepare": ours, "sentencepiece": theirs}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        counts = set()
        for number in range(rounds):
            for name in rotated(contenders, number):
                tokens, seconds = contenders[name](number)
                counts.add(tokens)
                rates[name].append(tokens / seconds)
                print(f"tokens round {number}: {name:14} {tokens / seconds:12,.0f} tokens/s", flush=True)
    assert len(counts) == 1, f"both must give the same tokens: {counts}"
    ratios = [one / other for one, other in zip(rates["prepare"], rates["sentencepiece"])]
    return {
        "text_megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "documents": len(texts),
        "tokens": counts.pop(),
        "tokens_per_s": rates,
        "ratio_prepare_to_sentencepiece": spread(ratios),
    }


def build_ours(lengths_path: str, threads: int) -> Measured:
    """The index of one epoch, as ``Stream`` builds it."""
    from llm_parallel import _C

    lengths = np.load(lengths_path)
    before = forget_peak()
    started = time.perf_counter()
    epoch = _C.Epoch(lengths.view(np.uint8), 1, True, "all", 0, 0, threads)
    seconds = time.perf_counter() - started
    peak = memory_bytes("VmHWM") - before
    samples = (epoch.tokens - 1) // SEQ_LENGTH
    started = time.perf_counter()
    for number in range(0, samples, max(samples // LOOKUPS, 1)):
        epoch.pieces(_C.permute(number, samples, 2) * SEQ_LENGTH, SEQ_LENGTH + 1)
    lookup = (time.perf_counter() - started) / LOOKUPS * 1e6
    return Measured({"index": seconds}, epoch.bytes, peak, lookup)


def build_megatron(lengths_path: str, _: int) -> Measured:
    """Document index, sample index and shuffle index, by the functions that GPTDataset calls."""
    from megatron.core.datasets import gpt_dataset, helpers

    lengths = np.load(lengths_path)
    tokens = int(lengths.sum(dtype=np.int64))
    documents = np.arange(len(lengths), dtype=np.int32)
    random = np.random.RandomState(1)
    before = forget_peak()
    parts = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        parts[name], clock = time.perf_counter() - clock, time.perf_counter()

    document_index = gpt_dataset._build_document_index(documents, 1, random, False)
    lap("document index")
    sample_index = helpers.build_sample_idx(lengths, document_index, SEQ_LENGTH, 1, tokens)
    lap("C++ sample index")
    samples = len(sample_index) - 1
    shuffle_index = gpt_dataset._build_shuffle_index(samples, samples, random)
    lap("shuffle index")
    kept = document_index.nbytes + sample_index.nbytes + shuffle_index.nbytes
    peak = memory_bytes("VmHWM") - before
    started = time.perf_counter()
    for number in range(0, samples, max(samples // LOOKUPS, 1)):
        place = shuffle_index[number]
        (first, _), (last, _) = sample_index[place], sample_index[place + 1]
        document_index[first : last + 1].tolist()
    lookup = (time.perf_counter() - started) / LOOKUPS * 1e6
    return Measured(parts, kept, peak, lookup)


BUILDS: dict[str, tuple[Callable[[str, int], Measured], int]] = {
    "ours, 2 threads": (build_ours, 2),
    "ours, 1 thread": (build_ours, 1),
    "megatron-core": (build_megatron, 1),
}


def measure_index(rounds: int, samples: int) -> dict[str, Any]:
    """Seconds, kept bytes and peak bytes of each build, and the ratios of megatron-core to ours."""
    found: dict[str, list[Measured]] = {name: [] for name in BUILDS}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/lengths.npy"
        documents = samples * SEQ_LENGTH // MEAN_DOCUMENT
        np.save(path, np.random.default_rng(0).geometric(1 / MEAN_DOCUMENT, documents).astype(np.int32))
        for number in range(rounds):
            for name in rotated(BUILDS, number):
                build, threads = BUILDS[name]
                with context.Pool(1) as pool:
                    measured = pool.apply(build, (path, threads))
                found[name].append(measured)
                parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in measured.parts.items())
                print(
                    f"index round {number}: {name:16} {sum(measured.parts.values()):7.2f} s ({parts}); kept "
                    f"{measured.kept / 2**20:,.0f} MiB, peak {measured.peak / 2**20:,.0f} MiB; lookup "
                    f"{measured.lookup_us:.1f} us",
                    flush=True,
                )
    theirs = found["megatron-core"]
    ratios = {}
    for name in list(BUILDS)[:2]:
        pairs = list(zip(theirs, found[name]))
        ratios[name] = {
            "time, all that GPTDataset builds": spread([total(t) / total(o) for t, o in pairs]),
            "time, C++ helper alone": spread([t.parts["C++ sample index"] / total(o) for t, o in pairs]),
            "peak memory": spread([t.peak / max(o.peak, 1) for t, o in pairs]),
            "kept memory": spread([t.kept / o.kept for t, o in pairs]),
        }
    return {
        "samples": samples,
        "documents": documents,
        "builds": {name: [vars(measured) for measured in rows] for name, rows in found.items()},
        "ratio_megatron_to_ours": ratios,
    }


def total(measured: Measured) -> float:
    """Seconds of a build."""
    return sum(measured.parts.values())


def rotated(names: dict[str, Any], number: int) -> list[str]:
    """The names in an order that changes from round to round."""
    listed = list(names)
    return listed[number % len(listed) :] + listed[: number % len(listed)]


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def memory_bytes(name: str) -> int:
    """Bytes of this process's memory: VmRSS is its present size, VmHWM the peak since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> int:
    """Resets the peak of this process's memory; returns the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def main() -> None:
    """Measures, prints, and saves to benchmarks/results/data_cpu_DATE.json if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=55)
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    from llm_parallel.bench.environment import environment  # brings torch, which what is measured must not hold

    result = {
        "machine": environment() | {name: version(name) for name in ("sentencepiece", "numpy")},
        "tokens": measure_tokens(args.rounds, args.megabytes),
        "index": measure_index(args.rounds, args.samples),
    }
    print(json.dumps(result["tokens"]["ratio_prepare_to_sentencepiece"]))
    print(json.dumps(result["index"]["ratio_megatron_to_ours"], indent=1))
    if args.save:
        path = Path(__file__).parent / "results" / f"data_cpu_{date.today().isoformat()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
