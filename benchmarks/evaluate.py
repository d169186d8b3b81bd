"""Processor-seconds of evaluations, ours beside lm-eval's own back end over transformers, on one thread.

Each contender has a process of its own. The tasks run in turns in both, over the same made-up items in the forms of the
sets (or over the files of --data-dir): MMLU with 5 examples, HellaSwag, GSM8K with 8 worked examples, and HumanEval,
whose answers both let our sandbox run. Loading the models is not counted; building prompts, tokenizing and scoring is.
Every choice and every text is compared.

    .venv/bin/python benchmarks/evaluate.py [--documents 12] [--batch 8] [--data-dir FOLDER] [--out FILE.md]
    .venv/bin/python benchmarks/evaluate.py --data-dir FOLDER --counts 2 40 10 10   # MMLU: 2 for each of 57 subjects

With --vllm-python, lm-eval's back end over vLLM takes part too: the Python of another environment that has vLLM for
CPUs, lm-eval, and this project with what it needs in a .pth file. vLLM compiles at its first request, which is made
before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.evaluate_equal import model_folder  # noqa: E402
from benchmarks.measured_on import sentence  # noqa: E402

OURS, HF, VLLM = "ours", "lm-eval hf", "lm-eval vLLM"
ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
"""Settings of vLLM, so that all that it computes is this process's, on one thread."""
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


def work(pipe: Connection) -> None:
    """A contender's process: measures the cases that it is sent."""
    import torch

    torch.set_num_threads(1)
    kind, options = pipe.recv()
    theirs: Any = None
    library = {OURS: "torch", HF: "transformers", VLLM: "vllm"}[kind]
    if kind == HF:
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(pretrained=options["model"], device="cpu", dtype="float32", batch_size=options["batch"])
    elif kind == VLLM:
        from lm_eval.api.instance import Instance
        from lm_eval.models.vllm_causallms import VLLM as VllmLM

        theirs = VllmLM(
            pretrained=options["model"], dtype="float32", device="cpu", max_model_len=options["context"],
            batch_size="auto", enable_prefix_caching=True,
        )  # fmt: skip
        theirs.loglikelihood([Instance("loglikelihood", {}, ("One and", " one"), 0)], disable_tqdm=True)
    pipe.send(f"{library} {metadata.version(library)}")
    while (case := pipe.recv()) is not None:
        if theirs is not None:
            pipe.send((*timed(theirs, case, options), None))
            continue
        from llm_parallel.evaluate.open import open_engine
        from llm_parallel.generate.load import Member

        with open_engine(request_of(case, options), Member(), None) as (lm, told):  # anew, so that nothing is kept
            pipe.send((*timed(lm, case, options), told()["tokens"]))


class Contender:
    """A process that measures one contender, in the environment of its own Python."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.kind, (self._pipe, theirs) = kind, Pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        python = options["vllm_python"] if kind == VLLM else sys.executable
        command = [python, __file__, "--work", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=self._log, stderr=self._log)
        theirs.close()
        self._pipe.send((kind, options))
        self.library: str = self._answer()

    def measure(self, case: str) -> Any:
        """Processor-seconds, samples, and the counts of tokens where they are known."""
        self._pipe.send(case)
        return self._answer()

    def end(self) -> None:
        """Lets the process end."""
        self._pipe.send(None)

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").rstrip().splitlines()
            ended = f"{self.kind} ended with status {self._process.wait()} before its figures came"
            raise SystemExit("\n".join([*said[-15:], ended])) from None


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, list[str]]:
    """How many documents there are, and a sentence on each whose choice or text differs."""
    pairs = [(f"{task} {n}", a, b) for task in theirs for n, (a, b) in enumerate(zip(ours[task], theirs[task]))]
    return len(pairs), [
        f"{name}: {_shown(a)} here, {_shown(b)} there" for name, a, b in pairs if _answer(a) != _answer(b)
    ]


def _shown(responses: Any) -> str:
    first = [response[0] for response in responses]
    if isinstance(first[0], str):
        return repr(first[0])
    return "log-probabilities " + ", ".join(f"{value:.5f}" for value, _ in first)


def _answer(responses: Any) -> Any:
    first = [response[0] for response in responses]
    if isinstance(first[0], str):
        return first
    return max(range(len(first)), key=lambda place: first[place][0])


def measure(options: dict[str, Any], wanted: list[str]) -> tuple[list[str], list[str]]:
    """Rows of the table; then the libraries that took part, and the documents whose answers differ."""
    taking_part = [Contender(kind, options) for kind in contenders(options)]
    with_what = ", ".join(f"{one.kind} on {one.library}" for one in taking_part)
    rows, remarks, totals = [], [f"Contenders: {with_what}."], dict.fromkeys(contenders(options), 0.0)
    for case in wanted:
        found = {one.kind: one.measure(case) for one in taking_part}
        seconds = {kind: found[kind][0] for kind in found}
        totals = {kind: totals[kind] + seconds[kind] for kind in found}
        same, tokens, counted = [], found[OURS][2], 0
        for kind in [kind for kind in found if kind != OURS]:
            counted, differ = differing(found[OURS][1], found[kind][1])
            same.append(counted - len(differ))
            remarks += [f"Other choice or text in {kind}: {what}." for what in differ]
        row = [case, counted, *times(seconds), tokens["run"], tokens["asked"], *same]
        rows.append(f"| {' | '.join(map(str, row))} |")
        print(rows[-1], flush=True)
    for one in taking_part:
        one.end()
    return [*rows, f"| all | | {' | '.join(times(totals))} | | |{' |' * (len(taking_part) - 1)}"], remarks


def contenders(options: dict[str, Any]) -> tuple[str, ...]:
    """Who takes part."""
    return (OURS, HF, VLLM) if options["vllm_python"] else (OURS, HF)


def times(seconds: dict[str, float]) -> list[str]:
    """Processor-seconds of each contender, and those of the others in parts of ours."""
    ratios = [f"{value / seconds[OURS]:.2f}" for kind, value in seconds.items() if kind != OURS]
    return [*(f"{value:.1f}" for value in seconds.values()), *ratios]


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
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM; without it vLLM takes no part")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the model's context, for vLLM")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(Connection(given.work))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", **(ONE_PROCESS if given.vllm_python else {})}
    with tempfile.TemporaryDirectory() as folder:
        from llm_parallel.evaluate.demo import write_demo

        data = given.data_dir or str(write_demo(Path(folder) / "data", max(2 * given.documents, 8)))
        model = given.model or model_folder(Path(folder) / "model")
        options = {
            "model": model, "data": data, "documents": given.documents, "counts": given.counts, "batch": given.batch,
            "vllm_python": given.vllm_python, "context": given.context,
        }  # fmt: skip
        rows, remarks = measure(options, given.cases)
    names = contenders(options)
    others = [kind for kind in names if kind != OURS]
    head = ["case", "documents", *names, *(f"{kind} over ours" for kind in others), "tokens run", "tokens asked",
            *(f"same as {kind}" for kind in others)]  # fmt: skip
    lines = [
        sentence("transformers", "lm-eval"),
        "",
        "Processor-seconds; the choices and texts that are ours are counted last.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
        *rows,
    ]
    for paragraph in remarks:
        lines += ["", paragraph]
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
