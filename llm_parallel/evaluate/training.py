"""Benchmarks scored within a training run, with the weights in training (``evaluate.tasks``)."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.evaluate.in_run_file import in_run_file, open_tasks
from llm_parallel.evaluate.open import PAGE_TOKENS, PASS_TOKENS
from llm_parallel.generate.command import end_tokens, prompt_prefix
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.metrics.record import TaskRecord, TaskScore
from llm_parallel.parallel.engine import network_of
from llm_parallel.train.run import Run, Scoring

if TYPE_CHECKING:
    from llm_parallel.evaluate.humaneval import Programs
    from llm_parallel.evaluate.lm import Texts
    from llm_parallel.evaluate.tasks import Tasks
    from llm_parallel.evaluate.together import Channel, Together

FOLDER = "evaluations"


def scoring_of(run: Run) -> Scoring | None:
    """What scores the run's tasks; None if it has none, or cannot see their data. Collective. Raises UserError for a
    new run of which a process cannot see the data; one that goes on reports it and leaves the scores out."""
    wanted = run.config.evaluate
    if not wanted.tasks:
        return None
    from llm_parallel.evaluate.together import Channel

    channel = Channel(run.groups)
    seen = wanted.data_dir is None or Path(wanted.data_dir).is_dir()
    said = channel.everybodys("" if seen else f"{socket.gethostname()} (rank {run.groups.rank})")
    without = [place for place in said if place]
    if not without:
        return TaskScoring(run.config, channel)
    others = f" and {len(without) - 1} more" if without[1:] else ""
    problem = (
        f"evaluate.data_dir = {wanted.data_dir} is no folder on {without[0]}{others}; put it where every process of "
        "the run sees it"
    )
    if not run.state.step:
        raise UserError(problem)
    run.metrics.message(f"{problem}; training goes on, and evaluate.tasks are not scored")
    run.metrics.event("tasks_failed", step=run.state.step, cause=problem)
    return None


class TaskScoring:
    """See ``Scoring``. The tasks are opened once, on rank 0."""

    def __init__(self, config: RunConfig, channel: Channel) -> None:
        self._config, self._channel = config, channel
        self._opened: tuple[Programs, Tasks] | None = None
        assert config.data.tokenizer is not None, "check_tasks demands it"
        self._tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)

    def score(self, run: Run) -> bool:
        """See ``Scoring``. What hinders scoring ends a run before its first step; later it is reported, and the run
        goes on. Raises UserError."""
        from llm_parallel.evaluate.together import GivenUp, Together

        network, wanted = network_of(run.engine), self._config.evaluate
        options = GeneratorOptions(
            max_running=wanted.max_running,
            pass_tokens=max(PASS_TOKENS, wanted.max_running),
            page_tokens=PAGE_TOKENS[run.groups.platform.device.type],
        )
        generator = Generator(run.engine, options, self._tokenizer)
        together = Together(generator, self._channel, run.wants_to_stop, network.before_micro_batch)
        problem = ""
        try:
            if run.groups.is_first_rank:
                problem = self._on_rank_0(run, generator, together)
            else:
                together.follow()
        except GivenUp:
            return False
        finally:
            generator.close()
        problem = self._channel.tell(problem)
        if problem and not run.state.step:
            raise UserError(problem)
        if problem:
            run.metrics.message(f"step {run.state.step}: {problem}; training goes on")
            run.metrics.event("tasks_failed", step=run.state.step, cause=problem)
        return True

    def _on_rank_0(self, run: Run, generator: Generator, together: Together) -> str:
        """Scores and records; returns why that failed, or nothing. Raises what another process's end raises here."""
        from llm_parallel.evaluate.together import GivenUp

        started, problem = time.monotonic(), ""
        try:
            results = self._results(run, generator, together)
            record_scores(run, results, time.monotonic() - started)
        except GivenUp:
            raise
        except Exception as error:
            if together.left:
                raise
            reason = in_run_file(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            problem = f"evaluate.tasks cannot be scored: {reason}"
        together.end()
        return problem

    def _results(self, run: Run, generator: Generator, together: Together) -> dict[str, Any]:
        from llm_parallel.evaluate.harness import Settings, merged, run_harness
        from llm_parallel.evaluate.lm import EngineLM

        if self._opened is None:
            self._opened = open_tasks(self._config.evaluate)
        programs, tasks = self._opened
        wanted = self._config.evaluate
        texts = self._texts()
        name = f"{run.config.run_dir} step {run.state.step}"
        info = {"model": name, "model_dtype": run.config.train.precision, "model_sha": name, "model_args": {}}
        lm = EngineLM(texts, together, info)
        try:
            system = run.config.chat.system if wanted.chat else None
            settings = Settings(wanted.samples, wanted.seed, wanted.new_tokens, wanted.chat, system)
            results = run_harness(lm, tasks, settings)
        finally:
            programs.close()
        facts = {
            "model": name, "model_mark": name, "precision": run.config.train.precision, "weights": "saved",
            "layout": {"layout": run.layout.describe()}, "context": texts.context,
            "tokenizer": self._tokenizer.fingerprint,
            "begin": [self._tokenizer.token(token) for token in texts.begin],
            "template": texts.encoder.template.source if texts.encoder is not None else None,
            "tokens": vars(together.tokens), "truncated": lm.truncated, "sandbox": programs.mode,
        }  # fmt: skip
        return merged(results, facts)

    def _texts(self) -> Texts:
        from llm_parallel.evaluate.lm import Texts

        config = self._config
        beside = Path(str(config.data.tokenizer))
        folders = [beside if beside.is_dir() else beside.parent]
        return Texts(
            self._tokenizer,
            tuple(prompt_prefix(self._tokenizer, folders)),
            frozenset(end_tokens(self._tokenizer, folders)),
            config.model.max_seq_length_tokens,
            open_encoder(config) if config.evaluate.chat else None,
        )


def record_scores(run: Run, results: Mapping[str, Any], seconds: float) -> None:
    """Writes results and samples into the run's folder, and the scores into its metrics. What cannot be written into
    the folder is reported."""
    from llm_parallel.evaluate.results import write_results

    step = run.state.step
    folder = Path(run.config.run_dir) / FOLDER / f"step_{step:07d}"
    scores = tuple(task_scores(results))
    try:
        write_results(folder, results)
    except UserError as error:
        said = str(error).replace("--out ", "").replace("; give another folder", "")
        run.metrics.message(f"step {step}: {said}; the scores of tasks are in the metrics alone")
    run.metrics.tasks(TaskRecord(step, scores, seconds))
    run.metrics.event("tasks", step=step, scores={f"{one.task} {one.metric}": one.value for one in scores})


def task_scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """The values of an evaluation: of groups, and of tasks that are in none."""
    from llm_parallel.evaluate.curve import points_of

    members: Mapping[str, Any] = results.get("group_subtasks", {})
    counts: Mapping[str, Any] = results.get("n-samples", {})

    def documents(task: str) -> int:
        if task in counts:
            return int(counts[task]["effective"])
        return sum(documents(member) for member in members.get(task, ()))

    found = []
    for point in points_of(0, results):
        metric, _, filtered = point.metric.partition(" (")
        name = f"{metric}/{filtered.rstrip(')')}" if filtered else metric
        found.append(TaskScore(point.task, name, point.value, point.error, documents(point.task)))
    return found
