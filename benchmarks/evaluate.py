"""Processor-seconds of evaluations, ours beside lm-eval's own back end over transformers, on one thread.

Each contender has a process of its own. The tasks run in turns in both, over the same made-up items in the forms of the
sets (or over the files of --data-dir): MMLU with 5 examples, HellaSwag, GSM8K with 8 worked examples, and HumanEval,
whose answers both let our sandbox run. Loading the models is not counted; building prompts, tokenizing and scoring is.
Every choice and every text is compared.

    .venv/bin/python benchmarks/evaluate.py [--documents 12] [--batch 8] [--data-dir FOLDER] [--out FILE.md]
    .venv/bin/python benchmarks/evaluate.py --data-dir FOLDER --counts 2 40 10 10   # MMLU: 2 for each of 57 subjects
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.evaluate_equal import model_folder  # noqa: E402
from benchmarks.measured_on import sentence  # noqa: E402

CONTENDERS = ("ours", "lm-eval hf")
CASES = {
    "MMLU, 5 examples": ("mmlu", 5, 1.0),
    "HellaSwag": ("hellaswag", 0, 2.0),
    "GSM8K, 8 examples": ("gsm8k_cot", 8, 0.5),
    "HumanEval": ("humaneval", 0, 0.5),
}
"""Task, its examples, and its share of --documents (of MMLU for each of four subjects)."""
NEW = 96


def limit_of(case: str, options: dict[str, Any]) -> int:
    """Documents of each task of a case."""
    if options["counts"]:
        return options["counts"][list(CASES).index(case)]
    return max(int(options["documents"] * CASES[case][2]), 1)


def request_of(case: str, options: dict[str, Any]) -> Any:
    """What is asked for in a case."""
    from llm_parallel.evaluate.request import EvaluateRequest

    task, shots, _ = CASES[case]
    return EvaluateRequest(
        options["model"], tasks=(task,), shots=shots, data_dir=Path(options["data"]), device="cpu", weights="fp32",
        limit=limit_of(case, options), new_tokens=NEW if task in ("gsm8k_cot", "humaneval") else None,
    )  # fmt: skip


def timed(lm: Any, case: str, options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Processor-seconds of a case, those of the sandbox's processes left out, and its samples."""
    from llm_parallel.evaluate.command import open_tasks
    from llm_parallel.evaluate.harness import Settings, run_harness

    request = request_of(case, options)
    programs, tasks = open_tasks(request, Path(options["data"]))
    started = time.process_time()
    results = run_harness(lm, tasks, Settings(request.limit, request.seed, request.new_tokens))
    seconds = time.process_time() - started
    programs.close()
    return seconds, {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def work(kind: str, options: dict[str, Any], pipe: Any) -> None:
    """A contender's process: measures the cases that it is sent."""
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress
    theirs = None
    if kind != "ours":
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=options["model"], device="cpu", dtype="float32", batch_size=options["batch"])
    pipe.send(None)
    while (case := pipe.recv()) is not None:
        if theirs is not None:
            pipe.send((*timed(theirs, case, options), None))
            continue
        from llm_parallel.evaluate.open import open_engine
        from llm_parallel.generate.load import Member

        with open_engine(request_of(case, options), Member(), None) as (lm, told):  # anew, so that nothing is kept
            pipe.send((*timed(lm, case, options), told()["tokens"]))


def alike(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, int]:
    """Documents with the same choice or text, and their number."""
    pairs = [(a, b) for task in theirs for a, b in zip(ours[task], theirs[task])]
    return sum(_answer(a) == _answer(b) for a, b in pairs), len(pairs)


def _answer(responses: Any) -> Any:
    first = [response[0] for response in responses]
    if isinstance(first[0], str):
        return first
    return max(range(len(first)), key=lambda place: first[place][0])


def measure(options: dict[str, Any], wanted: list[str]) -> list[str]:
    """Rows of the table."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for kind in CONTENDERS:
        pipes[kind], theirs = context.Pipe()
        context.Process(target=work, args=(kind, options, theirs), daemon=True).start()
        pipes[kind].recv()
    rows, totals = [], dict.fromkeys(CONTENDERS, 0.0)
    for case in wanted:
        found = {}
        for kind in CONTENDERS:
            pipes[kind].send(case)
            found[kind] = pipes[kind].recv()
            totals[kind] += found[kind][0]
        same, count = alike(found["ours"][1], found["lm-eval hf"][1])
        ours, theirs = (found[kind][0] for kind in CONTENDERS)
        tokens = found["ours"][2]
        cells = (
            case,
            count,
            f"{ours:.1f}",
            f"{theirs:.1f}",
            f"{theirs / ours:.2f}",
            tokens["run"],
            tokens["asked"],
            same,
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
        print(rows[-1], flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    ratio = totals["lm-eval hf"] / totals["ours"]
    return [*rows, f"| all | | {totals['ours']:.1f} | {totals['lm-eval hf']:.1f} | {ratio:.2f} | | | |"]


def main() -> None:
    """Measures and prints, and writes a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument(
        "--counts", type=int, nargs=len(CASES), help="documents of each case instead, of MMLU for each of its subjects"
    )
    parser.add_argument("--batch", type=int, default=8, help="batch size of lm-eval's back end")
    parser.add_argument("--model", help="Hugging Face folder; SmolLM2-135M if not given")
    parser.add_argument("--data-dir", help="files of the sets; made-up ones if not given")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        from llm_parallel.evaluate.demo import write_demo

        data = given.data_dir or str(write_demo(Path(folder) / "data", max(2 * given.documents, 8)))
        model = given.model or model_folder(Path(folder) / "model")
        options = {
            "model": model, "data": data, "documents": given.documents, "counts": given.counts, "batch": given.batch,
        }  # fmt: skip
        rows = measure(options, given.cases)
    lines = [
        sentence("transformers", "lm-eval"),
        "",
        "Processor-seconds; the same choices and texts are counted last.",
        "",
        "| case | documents | ours | lm-eval hf | ratio | tokens run | tokens asked | same answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
