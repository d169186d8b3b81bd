"""Whether evaluations are lm-eval's, sample by sample: ours in one process, with TP 3 and with PP 2, beside lm-eval's
own back end over transformers, on the same documents of each task for which data are there.

For each task and layout: answers that were compared, the largest difference of a log-probability, choices and texts
that differ, and whether prompts, scores and result keys are the same. An answer of which the two differ by more than
1e-4 is computed again in fp64 by transformers: the sum of many log-probabilities in fp32, of -50 say, is rounded by
that much, and the row says how far from the truth each of the two is at most, in parts of the sum. Exit status 1 if
ours is further from fp64 than 1e-5 of the sum, or if anything else differs. Sets that the folder of data lacks are
named.

    .venv/bin/python benchmarks/evaluate_equal.py --data-dir FOLDER [--documents 100] [--tasks mmlu hellaswag …]
        [--layouts one tp=3 pp=2] [--model FOLDER] [--new-tokens 64] [--work FOLDER] [--out FILE.md]

The documents of a group (MMLU has 57 tasks) are those of its tasks together, as many from each. --work keeps what was
computed: a later call with the same settings computes what is missing alone, and lists it all. Without --data-dir the
documents are made-up ones, which show the same and measure nothing about a model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measured_on import sentence  # noqa: E402

LAYOUTS = {"one": {}, "tp=3": {"tp": 3}, "pp=2": {"pp": 2}}
TOLERANCE = 1e-4
ROUNDING = 1e-5
"""Of a sum of log-probabilities in fp32, as a part of it: 30 layers and 49,152 tokens round it by some 4e-6."""
LEAVES = {"mmlu": 57, "mmlu_continuation": 57, "agieval_en": 10, "ceval-valid": 52, "cmmlu": 67}
"""Tasks of a group."""
HEAD = ("task", "layout", "documents", "answers", "largest difference", "beyond 1e-4", "ours from fp64, relative",
        "lm-eval from fp64, relative", "choices that differ", "texts that differ", "prompts, keys, scores")  # fmt: skip
Beyond = tuple[str, str, float, float]
"""An answer of which the two differ by more than the tolerance: context, continuation, our log-probability, theirs."""


@dataclass
class Comparison:
    """What was found of one task in one layout. beyond: answers of which the two differ by more than the tolerance;
    ours, theirs: how far from fp64 these are at most, relative; notes: what else differs, in words."""

    documents: int = 0
    answers: int = 0
    largest: float = 0.0
    choices: int = 0
    texts: int = 0
    beyond: list[Beyond] = field(default_factory=list)
    ours: float = 0.0
    theirs: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing differs but by what fp32 rounds."""
        return self.ours <= ROUNDING and not (self.choices or self.texts or self.notes)

    def cells(self) -> tuple[str, ...]:
        """Under ``HEAD``, after task and layout."""
        far = (f"{self.ours:.1e}", f"{self.theirs:.1e}") if self.beyond else ("", "")
        notes = "the same" if not self.notes else "; ".join(self.notes[:3])
        counts = str(self.choices), str(self.texts), notes
        return str(self.documents), str(self.answers), f"{self.largest:.1e}", str(len(self.beyond)), *far, *counts


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> Comparison:
    """Compares two results of the same task or group."""
    found = Comparison()
    if missing := set(theirs) - {"samples"} - set(ours):
        found.notes.append(f"result keys {', '.join(sorted(missing))} are missing")
    for task, samples in theirs["samples"].items():
        mine = ours["samples"].get(task, [])
        if len(mine) != len(samples):
            found.notes.append(f"{task} has {len(mine)} samples and not {len(samples)}")
        first = samples[0]["filter"] if samples else None  # a document has a sample for each of its task's filters
        for one, other in zip(mine, samples):
            if other["filter"] == first:
                found.documents += 1
                compare_sample(task, one, other, found)
    for task, values in theirs["results"].items():
        for name, value in values.items():
            got = ours["results"].get(task, {}).get(name)
            if isinstance(value, float) and "stderr" not in name and (got is None or abs(got - value) > 1e-9):
                found.notes.append(f"{task} {name} is {got} and not {value}")
    return found


def compare_sample(task: str, one: dict[str, Any], other: dict[str, Any], found: Comparison) -> None:
    """Adds one document to what was found."""
    from llm_parallel.evaluate.pairs import arguments_of

    hashes = "doc_hash", "prompt_hash", "target_hash"
    if any(one[name] != other[name] for name in hashes):
        found.notes.append(f"document {one['doc_id']} of {task} has another prompt")
        return
    pairs = list(zip(one["resps"], other["resps"], strict=True))
    found.answers += len(pairs)
    if isinstance(pairs[0][1][0], str):
        found.texts += sum(a != b for a, b in pairs)
        return
    scores = [[float(answers[0][0]) for answers in row] for row in zip(*pairs)]
    found.largest = max(found.largest, *(abs(a - b) for a, b in zip(*scores)))
    texts = [(str(asked[0]), str(asked[1])) for asked in arguments_of(other)]
    found.beyond += [(*text, a, b) for text, a, b in zip(texts, *scores, strict=True) if abs(a - b) > TOLERANCE]
    best = [max(range(len(row)), key=row.__getitem__) for row in scores]
    found.choices += best[0] != best[1]


def limit_of(task: str, options: dict[str, Any]) -> int:
    """Documents of each task of a group."""
    return -(-options["documents"] // LEAVES.get(task, 1))


def request_of(task: str, options: dict[str, Any], layout: str, out: Path) -> Any:
    """What is asked for."""
    from llm_parallel.evaluate.request import EvaluateRequest

    return EvaluateRequest(
        options["model"], tasks=(task,), data_dir=Path(options["data"]), limit=limit_of(task, options),
        new_tokens=options["new_tokens"], device="cpu", out=out, **LAYOUTS[layout],
    )  # fmt: skip


def ours(task: str, options: dict[str, Any], layout: str, out: Path) -> dict[str, Any]:
    """Results of the command, in processes of its own."""
    from llm_parallel.evaluate.results import read_results

    if (out / "results.json").is_file():
        return read_results(out)
    axes = [f"--{axis}={size}" for axis, size in LAYOUTS[layout].items()]
    new = [] if options["new_tokens"] is None else ["--new-tokens", str(options["new_tokens"])]
    subprocess.run(
        [sys.executable, "-m", "llm_parallel.cli", "evaluate", options["model"], "--tasks", task, "--data-dir",
         options["data"], "--limit", str(limit_of(task, options)), "--device", "cpu", "--out", str(out), *axes, *new],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return read_results(out)


def reference(options: dict[str, Any], pipe: Any) -> None:
    """lm-eval's back end, in a process of its own: a file of results for each task that it is sent, or why none; of a
    list of answers it says how far they are from fp64 at most, ours and its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress
    lm = None
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, list):
            pipe.send(from_truth(options["model"], asked))
            continue
        task, out = asked
        if (out / "results.json").is_file():
            pipe.send("")
            continue
        if lm is None:
            import torch
            from lm_eval.models.huggingface import HFLM

            torch.set_num_threads(1)
            lm = HFLM(pretrained=options["model"], device="cpu", dtype="float32", batch_size=options["batch"])
        pipe.send(answered_by(lm, request_of(task, options, "one", out), out))


def answered_by(lm: Any, request: Any, out: Path) -> str:
    """Writes the results of lm-eval's back end; returns why there are none, or nothing."""
    from llm_parallel.errors import UserError
    from llm_parallel.evaluate.command import open_tasks
    from llm_parallel.evaluate.harness import Settings, run_harness
    from llm_parallel.evaluate.results import write_results

    try:
        programs, tasks = open_tasks(request, out)
    except UserError as error:
        return str(error)
    write_results(out, run_harness(lm, tasks, Settings(request.limit, request.seed, request.new_tokens)))
    programs.close()
    return ""


def from_truth(model: str, beyond: list[Beyond]) -> tuple[float, float]:
    """The largest distance from transformers' log-probability in fp64, of ours and of lm-eval's, in parts of it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, device="cpu", dtype="float64", batch_size=1)
    asked = [Instance("loglikelihood", {}, pair[:2], 0) for pair in beyond]
    truth = [log_prob for log_prob, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    ours, theirs = (
        [abs(pair[place] - true) / max(abs(true), 1.0) for pair, true in zip(beyond, truth, strict=True)]
        for place in (2, 3)
    )
    return max(ours), max(theirs)


def compared(
    options: dict[str, Any], given: argparse.Namespace, folder: Path
) -> Iterator[tuple[tuple[str, ...], bool | None]]:
    """Rows under ``HEAD``, each as soon as it is known, and whether nothing differs; of a task without data the
    task and the reason, and None."""
    from llm_parallel.evaluate.results import read_results

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=reference, args=(options, theirs), daemon=True).start()
    for task in given.tasks:
        kept = folder / f"{task} {Path(options['model']).name} {options['documents']} {options['new_tokens']}"
        wanted = kept / "hf"
        pipe.send((task, wanted))
        if reason := pipe.recv():
            yield (task, reason), None
            continue
        for layout in given.layouts:
            found = compare(ours(task, options, layout, kept / layout), read_results(wanted))
            if found.beyond:
                pipe.send(found.beyond)
                found.ours, found.theirs = pipe.recv()
            yield (task, layout, *found.cells()), found.holds
    pipe.send(None)


def model_folder(folder: Path) -> str:
    """SmolLM2-135M with the names of its special tokens beside it, without which lm-eval's back end fails."""
    from tests.support.smollm import smollm_folder

    folder.mkdir()
    for file in smollm_folder().iterdir():
        shutil.copy(file, folder / file.name)  # a link that leaves the folder is refused
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return str(folder)


def main() -> None:
    """Compares and prints, and writes a file if asked to."""
    from llm_parallel.evaluate.catalog import LLAMA2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="files of the sets; made-up ones if not given")
    parser.add_argument("--documents", type=int, default=100, help="of each task")
    parser.add_argument("--tasks", nargs="+", default=[*LLAMA2, "truthfulqa_mc1", "truthfulqa_mc2", "toxigen"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--model", help="Hugging Face folder; SmolLM2-135M if not given")
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--batch", type=int, default=8, help="batch size of lm-eval's back end")
    parser.add_argument("--work", type=Path, help="folder that keeps what was computed")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as made:
        from llm_parallel.evaluate.demo import write_demo

        data = given.data_dir or str(write_demo(Path(made) / "data", given.documents))
        options = {
            "model": given.model or model_folder(Path(made) / "model"), "data": data, "documents": given.documents,
            "new_tokens": given.new_tokens, "batch": given.batch,
        }  # fmt: skip
        rows: list[tuple[str, ...]] = []
        without: list[tuple[str, ...]] = []
        fine = True
        for row, holds in compared(options, given, given.work or Path(made)):
            (without if holds is None else rows).append(row)
            fine = fine and holds is not False
            print(" | ".join(row), flush=True)
    lines = [
        sentence("transformers", "lm-eval"),
        "",
        f"| {' | '.join(HEAD)} |",
        f"| {' | '.join('---' for _ in HEAD)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"Without data: {task} ({reason})." for task, reason in without),
    ]
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")
    sys.exit(0 if rows and fine else 1)


if __name__ == "__main__":
    main()
