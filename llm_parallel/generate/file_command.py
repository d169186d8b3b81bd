"""``llm-parallel generate --input``: starts the processes of a layout, and is each of them."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from llm_launch.local import launch_local
from llm_launch.worker import EXIT_CRASH, report_error, worker_environment
from llm_parallel.config.tree import ParallelConfig, RunConfig
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.command import (
    end_tokens,
    open_model,
    prompt_prefix,
    sampling_of,
    structure_of,
    tokenizer_of,
)
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.files import FileJob, PromptReader, answer_line, read_source
from llm_parallel.generate.load import Member, describe_folder, newest
from llm_parallel.generate.parts import Key, Parts
from llm_parallel.generate.replicas import (
    Answerer,
    Claims,
    Out,
    Place,
    Progress,
    Replica,
    Total,
    Totals,
    chunk_size,
    first_problem,
)
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.generate.requests import Finished, Request
from llm_parallel.generate.watchdog import Watchdog
from llm_parallel.lines import note
from llm_parallel.model.hf import is_hf_folder
from llm_parallel.options import to_json
from llm_parallel.parallel.groups import close_groups
from llm_parallel.parallel.platform import resolve_device

WAIT_S = 0.05
Export = Callable[[Path, Path], object]
Record = tuple[str, Any]
"""Place and content of a line."""


def file_command(request: GenerateRequest, environment: Mapping[str, str], export: Export) -> int:
    """Answers a file of prompts; returns the exit status. Under torchrun or srun this is one of the processes, else it
    starts them. ``export``: writes a checkpoint as a Hugging Face folder. Raises UserError."""
    job = job_of(request)
    records = list(read_source(job.source))
    request = replace(request, checkpoint=os.path.realpath(newest(request.checkpoint)))
    place = worker_environment(environment)
    if place is not None and place.world_size > 1:
        if place.world_size != request.num_processes:
            raise UserError(
                f"{place.world_size} processes were started, and --tp {request.tp} --pp {request.pp} --dp {request.dp} "
                f"is a layout of {request.num_processes}; start as many"
            )
        place.export()
        return answer_here(request, Member(place.rank, place.local_rank, place.world_size), note)
    parts = Parts(job.target, mark_of(request, job))
    parts.known()  # those of another job are refused before any process starts
    status = EXIT_CRASH  # where an error goes on to the caller
    try:
        if request.engine == "vllm":
            status = answer_by_vllm(request, environment, export)
        else:
            status = answer_here(request, Member(), note) if request.num_processes == 1 else _start(request)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    finally:
        if status and parts.begun():
            done, total = len(parts.known()), len(records) * job.samples
            note(f"{done} of {total} answers are complete in {parts.folder}; the same command goes on with the others")
    return status


def _start(request: GenerateRequest) -> int:
    logs = request.logs or Path(tempfile.mkdtemp(prefix="llm-parallel-generate-"))
    note(f"[{request.num_processes} processes; their logs are in {logs}]")
    content = to_json(replace(request, logs=logs))
    status = launch_local(request.num_processes, ["-m", "llm_parallel.generate", content], logs)
    if status == 0 and request.logs is None:
        shutil.rmtree(logs, ignore_errors=True)
    return status


def job_of(request: GenerateRequest) -> FileJob:
    """What is to be answered, and how. Raises UserError."""
    assert request.input is not None and request.output is not None
    return FileJob(
        request.input,
        request.output,
        sampling_of(request),
        tuple(request.stop),
        request.samples,
        request.best_of,
        request.max_running,
        structure_of(request),
    )


def mark_of(request: GenerateRequest, job: FileJob) -> str:
    """What tells the answers from those of other models and settings. Those of weights in few bits are others."""
    model = request.checkpoint if request.weights == "saved" else f"{request.checkpoint} in {request.weights}"
    return job.fingerprint(model if request.engine == "ours" else f"{model} by {request.engine}")


@dataclass(frozen=True)
class _Left:
    """places: numbers of the prompts that are not complete; known: answers to these that are; done: all that are."""

    places: Sequence[int] = ()
    known: frozenset[Key] = frozenset()
    done: int = 0


def answer_here(request: GenerateRequest, member: Member, tell: Callable[[str], None]) -> int:
    """One process of the layout. ``tell``: says on the first process how far all of them are. Returns the exit status.
    Raises UserError, on all processes where it concerns all."""
    parallel = ParallelConfig(tp=request.tp, pp=request.pp, dp=request.dp)
    loaded, tokenizer, folders = open_model(request.checkpoint, request.held(), replace(member, parallel=parallel))
    try:
        options = GeneratorOptions(max_running=request.max_running, pass_tokens=max(512, request.max_running))

        @contextmanager
        def engine() -> Iterator[Answerer]:
            yield Generator(loaded.network, options, tokenizer)

        reader = _reader(loaded.config, tokenizer, folders)
        _Process(request, reader, Place.of(loaded.network.groups), tell).run(engine)
    finally:
        close_groups()
    return 0


def answer_by_vllm(request: GenerateRequest, environment: Mapping[str, str], export: Export) -> int:
    """Answers a file by vLLM. Returns the exit status. Raises UserError."""
    from llm_parallel.generate.vllm_engine import VllmEngine, VllmOptions, vllm_python

    python = vllm_python(request.engine_python, environment)
    checkpoint, job = Path(request.checkpoint), job_of(request)
    config = describe_folder(checkpoint)
    if config.adapter is not None:
        raise UserError(
            f"{checkpoint} holds adapters, which --engine vllm does not take here; make a whole model of them first "
            "(llm-parallel convert --merge)"
        )
    tokenizer, folders = tokenizer_of(checkpoint, config)
    parts = Parts(job.target, mark_of(request, job))
    precision = config.train.precision if request.weights == "saved" else request.weights
    options = VllmOptions(
        "bfloat16" if precision == "bf16" else "float32",
        resolve_device(request.device),
        request.tp,
        request.pp,
        request.max_running,
    )

    @contextmanager
    def engine() -> Iterator[Answerer]:
        folder = checkpoint
        if not is_hf_folder(checkpoint):
            folder = parts.folder / "model"
            if not folder.is_dir():
                export(checkpoint, folder)
        logs = request.logs or parts.folder
        answers = VllmEngine(
            python, folder, config.model, options, logs / "vllm.log", environment, stops=bool(job.stop)
        )
        note(f"[vLLM {answers.version} answers; its log is in {logs}]")
        with closing(answers):
            yield answers

    _Process(request, _reader(config, tokenizer, folders), Place(), note).run(engine)
    return 0


def _reader(config: RunConfig, tokenizer: Tokenizer, folders: Sequence[Path]) -> PromptReader:
    ends = frozenset(end_tokens(tokenizer, folders))
    return PromptReader(config, tokenizer, prompt_prefix(tokenizer, folders), ends)


class _Process:
    """One process while it answers its part of a file."""

    def __init__(
        self, request: GenerateRequest, reader: PromptReader, place: Place, tell: Callable[[str], None]
    ) -> None:
        self._request, self._job, self._reader, self._place, self._tell = request, job_of(request), reader, place, tell
        self._first, self._several = place.rank == 0, place.world_size > 1
        self._records: list[Record] = list(read_source(self._job.source))
        self._asked: dict[int, Request] = {}
        self._returned: Counter[int] = Counter()
        self._mark = mark_of(request, self._job)
        self._parts = Parts(self._job.target, self._mark)

    def run(self, open_engine: Callable[[], AbstractContextManager[Answerer]]) -> None:
        """Answers until all replicas have finished. Raises UserError."""
        job, keys = self._job, [(n, each) for n in range(len(self._records)) for each in range(self._job.samples)]
        with ExitStack() as stack:
            left = self._agree(stack, keys)
            if left.done and self._first:
                self._tell(f"[{job.target} has {left.done} answers already; {len(keys) - left.done} are left]")
            if left.places:
                with open_engine() as engine:
                    self._answer(engine, left, len(keys) - left.done)
            if self._first:
                self._parts.merge(keys)

    def _ask(self, number: int) -> Request:
        """The request of a prompt, kept until all of its answers are there."""
        request = self._asked[number] = self._request_of(number)
        return request

    def _request_of(self, place: int) -> Request:
        where, record = self._records[place]
        return self._reader.request(record, where, self._job, place)

    def _agree(self, stack: ExitStack, keys: Sequence[Key]) -> _Left:
        """What is left, as the first process finds it. Raises UserError on every process if one finds that a line
        cannot be answered, or that answers cannot be written."""
        left, problem, at = _Left(), None, self._place
        place = at.rank
        try:
            for place in range(at.rank, len(self._records), at.world_size):
                self._request_of(place)
            if self._first:
                place = len(self._records)
                stack.enter_context(self._parts.held())
                known = self._parts.known()
                places = sorted({number for number, sample in keys if (number, sample) not in known})
                wanted = set(places)
                left = _Left(places, frozenset(key for key in known if key[0] in wanted), len(known))
        except UserError as error:
            problem = place, str(error)
        found: list[Any] = [(problem, self._mark)]
        if self._several:
            found = [None] * at.world_size
            dist.all_gather_object(found, (problem, self._mark))
        message = first_problem([each for each, _ in found])
        if message is None and len({mark for _, mark in found}) > 1:
            message = f"processes see different inputs or models; is {self._request.checkpoint} being written?"
        if message is not None:
            raise UserError(message)
        box = [left]
        if self._several:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _answer(self, engine: Answerer, left: _Left, total: int) -> None:
        job = self._job
        if job.structure is not None and isinstance(engine, Generator):
            engine.checked(self._request_of(left.places[0]))  # its structure is that of all
        store = distributed_c10d._get_default_store() if self._several else dist.HashStore()
        store = dist.PrefixStore("generate", store)
        totals, out = Totals(store), None
        chunk = chunk_size(len(left.places), self._place.replicas, job.max_running)
        claims = Claims(store, len(left.places), chunk, self._place.replica, self._place.writes)
        if self._place.writes:
            out = Out(self._parts, self._place.replica, self._line, left.known, job.structure is not None)
        progress = Progress(total, self._place.replicas, self._tell) if self._first else None
        replica = Replica(
            engine, claims, lambda place: self._ask(left.places[place]), out.take if out else lambda _: None
        )
        with Watchdog(self._request.hang_s, self._hang) as watchdog:
            while replica.step():
                watchdog.tick()
                if out is not None:
                    out.flush(totals)
                    totals.passed()
                if progress is not None:
                    progress.look(totals.read)
            if out is not None:
                out.close()
            totals.add(done=1)  # after this the process asks the first one's store for nothing
            if progress is not None:
                self._wait(totals, progress, watchdog)

    def _wait(self, totals: Totals, progress: Progress, watchdog: Watchdog) -> None:
        """Waits for the other processes."""
        last = Total()
        while (found := totals.read()).done < self._place.world_size:
            if found != last:
                watchdog.tick()
                last = found
            progress.look(totals.read)
            time.sleep(WAIT_S)
        progress.say(found)

    def _line(self, answer: Finished) -> dict[str, Any]:
        request = self._asked[answer.number]
        self._returned[answer.number] += 1
        if self._returned[answer.number] == request.n:
            del self._asked[answer.number], self._returned[answer.number]
        return answer_line(answer, request, self._records[answer.number][1], self._reader.tokenizer)

    def _hang(self) -> None:
        """Ends the process: what it waits for may never come. Its peers end too, by their launcher or in the same
        way."""
        rank, limit = self._place.rank, self._request.hang_s
        error = TimeoutError(f"no progress for {limit:g} s (--hang-s): a process of the layout or its device hangs")
        if self._request.logs is None:
            note(f"rank {rank}: {error}; the answers that are complete are in {self._parts.folder}")
        else:
            report_error(self._request.logs, rank, error)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CRASH)
