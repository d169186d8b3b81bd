"""``llm-parallel bench scaling``: real training runs of a few steps over world sizes and layouts, one CSV row each.

A sweep is a YAML file beside a run file:

    base: run.yaml              # relative to the sweep
    steps: 12                   # of each run
    warmup: 4                   # steps that are not counted
    repeats: 2
    series:
      weak dp:                  # rows of one series must be the same work, or grow it with the processes
        - {parallel.dp: 1, train.global_batch_size: 8}
        - {parallel.dp: 2, train.global_batch_size: 16}
    cluster: dgx-h100           # optional: what the planner predicts with, as --cluster

A run may name what others published for it under ``reference``, whose fields published_references.py explains;
benchmarks/suites has such sweeps. Started again, it makes only the rows that its CSV lacks; several processes may write
one CSV at a time, as the tasks of a SLURM array do with ``--index``.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from llm_launch.slurm import SlurmJob
from llm_parallel.bench.environment import environment
from llm_parallel.bench.gate import load_result, slower_than
from llm_parallel.bench.layout_step import typical_split
from llm_parallel.bench.published_references import (
    Line,
    Reference,
    check_layout,
    measured_of,
    predicted,
    print_table,
    reference_of,
    slower_than_published,
)
from llm_parallel.bench.requests import ScalingRequest
from llm_parallel.bench.step_request import label
from llm_parallel.config.load import load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.lines import say
from llm_parallel.planner.hardware import Cluster, load_cluster
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.planner.step_parts import StepTime
from llm_parallel.planner.steptime import step_time
from llm_parallel.screen import say_next
from llm_parallel.train.preflight import with_vocabulary

KEYS = {"base", "steps", "warmup", "repeats", "series", "cluster"}
QUIET = ("log.tensorboard=false", "log.plots=false", "data.eval_fraction=0", "elastic.replicate_every_steps=0")


@dataclass(frozen=True)
class Entry:
    """One run of a sweep."""

    series: str
    """Name of its series."""
    repeat: int
    """Number of the repeat, from 0."""
    overrides: tuple[str, ...]
    """What it changes in the base run file."""
    config: RunConfig
    """The whole configuration."""
    reference: Reference | None = None
    """What was published for it."""

    @property
    def key(self) -> str:
        """Identifies the run in a CSV."""
        text = json.dumps([self.series, self.repeat, self.config.model_dump(mode="json")], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    base: Path
    """Run file of all runs."""
    warmup: int
    """Steps of each run that are not counted."""
    entries: tuple[Entry, ...]
    """The runs."""
    cluster: str | None = None
    """What the planner predicts with."""


def read_sweep_file(path: str) -> Sweep:
    """Reads a sweep file. Raises UserError for a field that is missing or wrong, and for a run that could not start."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"sweep {path} cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("series"), dict) or "base" not in tree:
        raise UserError(f"sweep {path} must have `base`, a run file, and `series`, lists of overrides by name")
    unknown = set(tree) - KEYS
    if unknown:
        raise UserError(f"sweep {path}: {sorted(unknown)[0]} is unknown; there are {', '.join(sorted(KEYS))}")
    if not tree["series"]:
        raise UserError(f"sweep {path} is empty: series names no run; give lists of {{section.field: value}} by name")
    steps, warmup, repeats = (tree.get(name, value) for name, value in (("steps", 12), ("warmup", 4), ("repeats", 2)))
    for name, value in (("steps", steps), ("warmup", warmup), ("repeats", repeats)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"sweep {path}: {name} {value!r} must be a whole number")
    if not 0 <= warmup < steps or repeats < 1:
        raise UserError(f"sweep {path}: warmup {warmup} must be under steps {steps}, and repeats {repeats} at least 1")
    base = (Path(path).parent / str(tree["base"])).resolve()
    entries = []
    for series, rows in tree["series"].items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"sweep {path}: series {series} is empty; give a list of {{section.field: value}}")
        for row in rows:
            where = f"sweep {path}: series {series}"
            reference = reference_of(row["reference"], where) if "reference" in row else None
            overrides = tuple(f"{name}={json.dumps(value)}" for name, value in row.items() if name != "reference")
            config = with_vocabulary(load_config(base, [*overrides, f"train.steps={steps}", *QUIET], notice=_silent))
            entries += [Entry(str(series), repeat, overrides, config, reference) for repeat in range(repeats)]
    cluster = tree.get("cluster")
    return Sweep(base, warmup, tuple(entries), None if cluster is None else str(cluster))


def _silent(_: str) -> None:
    pass


def scaling_command(request: ScalingRequest) -> int:
    """Makes the runs that the CSV lacks; exit status 1 if one failed, or is slower than the baseline or the published
    figure allows."""
    sweep = read_sweep_file(request.sweep)
    cluster = load_cluster(name) if (name := request.cluster or sweep.cluster) else None
    out = Path(request.out or Path(request.sweep).with_suffix(".csv"))
    if not 0.0 < request.min_ratio <= 10.0:
        raise UserError(f"--min-ratio {request.min_ratio} is not over 0 and at most 10; 0.95 allows 5 % loss")
    if request.baseline:
        load_result(request.baseline)
    if request.index is not None and not 0 <= request.index < len(sweep.entries):
        raise UserError(f"--index {request.index} is not one of the sweep's {len(sweep.entries)} runs, 0 to "
                        f"{len(sweep.entries) - 1}")  # fmt: skip
    chosen = range(len(sweep.entries)) if request.index is None else [request.index]
    for index in chosen if request.dry_run else []:
        check_layout(sweep.entries[index].config)
    failed = _run_missing(sweep, chosen, out, cluster, request)
    lines = _lines(sweep, chosen, read_csv(out), cluster)
    print_table(lines, cluster, request.min_ratio)
    if request.dry_run:
        say_next(f"llm-parallel bench scaling {quote(str(request.sweep))} --out {quote(str(out))}")
        return 0
    failed += slower_than_published(lines, request.min_ratio)
    if request.baseline:
        failed += slower_than(request.baseline, _as_result(read_csv(out)), request.min_ratio)
    with atomic_write(out.with_suffix(".json")) as handle:
        json.dump(_as_result(read_csv(out)), handle, indent=1)
    say_next(f"llm-parallel report --csv {quote(str(out))} --out {quote(str(out.with_suffix('.html')))}")
    return int(failed > 0)


def _run_missing(
    sweep: Sweep, chosen: Sequence[int], out: Path, cluster: Cluster | None, request: ScalingRequest
) -> int:
    """Names every chosen run, and makes those that the CSV lacks except in a dry run; returns how many failed."""
    done = {row["key"] for row in read_csv(out)}
    failed = 0
    for index in chosen:
        entry = sweep.entries[index]
        name = f"{entry.series}, {num_processes(entry.config)} processes, repeat {entry.repeat}"
        # Long lists, such as stage_layers, would fill the screen.
        overrides = " ".join(text if len(text) < 60 else f"{text[:56]} …" for text in entry.overrides)
        there = f": already in {out}" if entry.key in done else ""
        say(f"--index {index}: {name}: {overrides}{there}")
        if not there and not request.dry_run:
            failed += not _run(entry, sweep, out, cluster, request.environment)
    return failed


def _lines(
    sweep: Sweep, chosen: Sequence[int], rows: Sequence[Mapping[str, str]], cluster: Cluster | None
) -> list[Line]:
    """A line of the table for each configuration of the chosen runs."""
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for index in chosen:
        groups.setdefault((sweep.entries[index].series, sweep.entries[index].overrides), []).append(index)
    lines = []
    for indices in groups.values():
        entry = sweep.entries[indices[0]]
        forecast = predicted(entry.config, cluster) if cluster and entry.config.model.vocab_size else None
        measured = measured_of(rows, [sweep.entries[index].key for index in indices])
        lines.append(Line(indices[0], entry.series, entry.config, entry.reference, forecast, *measured))
    return lines


def _run(entry: Entry, sweep: Sweep, out: Path, cluster: Cluster | None, environ: Mapping[str, str]) -> bool:
    """Makes one run and adds its row; returns whether it succeeded. A run that fails leaves no row, so it is tried
    again by the next start."""
    # Beside the CSV, since that is on a disk that all nodes of a job share.
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.stem}-", dir=out.parent))
    trainer = "launch" if SlurmJob.from_environment(environ) else "pretrain"
    steps = f"train.steps={entry.config.train.steps}"
    command = [sys.executable, "-m", "llm_parallel.cli", trainer, str(sweep.base), *entry.overrides, steps, *QUIET]
    try:
        ended = subprocess.run(
            [*command, f"run_dir={folder / 'run'}"], env=dict(environ), capture_output=True, text=True
        )
        records = list(read_jsonlines(folder / "run" / "metrics.jsonl")) if ended.returncode == 0 else []
        measured = [record for record in records if record.get("step", 0) > sweep.warmup and "perf/step_time" in record]
        if not measured:
            say(f"  failed with status {ended.returncode}: {(ended.stderr or ended.stdout).strip()[-500:]}")
            return False
        start = next(record for record in records if record.get("event") == "run_start")
        append_csv(out, as_row(entry, measured, start, cluster))
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def as_row(
    entry: Entry, measured: Sequence[Mapping[str, Any]], start: Mapping[str, Any], cluster: Cluster | None
) -> dict[str, Any]:
    """The row of one run: its work, layout, times (medians over its steps), environment and whole configuration."""
    config, model, parallel = entry.config, entry.config.model, entry.config.parallel
    size = int(start["size"])
    times = [float(record["perf/step_time"]) for record in measured]
    median = statistics.median(times)
    # Of the step with the median time, since the parts of one step add up and medians over several do not.
    typical = min(measured, key=lambda record: abs(float(record["perf/step_time"]) - median))
    scale = median / float(typical["perf/step_time"])
    parts = {name: scale * float(typical[f"perf/{name}_time"]) for name in ("data", "forward_backward", "optimizer")}
    last = measured[-1]
    found = environment()
    forecast = step_time(shape_of(model), strategy_of(config, size), cluster) if cluster else None
    causes = forecast.parts() if forecast else dict.fromkeys((field.name for field in fields(StepTime)), "")
    replicas = size // (parallel.tp * parallel.pp * parallel.cp)
    return {
        "key": entry.key, "series": entry.series, "repeat": entry.repeat, "world_size": size,
        "global_batch_size": config.train.global_batch_size, "step_time_s": median, "step_time_min_s": min(times),
        "step_time_max_s": max(times), "predicted_step_time_s": forecast.total if forecast else "",
        "tokens_per_s_per_gpu": statistics.median(float(r["perf/tokens_per_s_per_gpu"]) for r in measured),
        "mfu": last.get("perf/mfu", ""), "mfu_convention": "model", "memory_gib": last["memory/allocated_gib"],
        "loss": last["train/loss"], **{f"time_{name}_s": value for name, value in parts.items()},
        "time_other_s": max(0.0, median - sum(parts.values())),
        **{f"time/{name}_s": mean for name, (mean, _) in typical_split(measured).items()},
        **{f"predicted/{name}_s": value for name, value in causes.items()}, "cluster": cluster.name if cluster else "",
        "dp": replicas, "tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "vpp": parallel.vpp,
        "micro_batch_size": config.train.micro_batch_size, "recompute": parallel.recompute,
        "model": label(config).split(" s")[0], "num_layers": model.num_layers, "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size, "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_query_groups, "vocab_size": model.vocab_size,
        "seq_length_tokens": config.data.seq_length_tokens, "precision": config.train.precision,
        "device_name": found["chip"], "backend": "nccl" if start["is_cuda"] else "gloo", "date": found["date"],
        "commit": found["commit"], "load_average_1_min": found["load_average_1_min"],
        "versions": json.dumps(start["versions"]), "config": json.dumps(config.model_dump(mode="json")),
    }  # fmt: skip


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a sweep's CSV; none if there is no file yet. Raises UserError if the file is not such a CSV."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if rows and "key" not in rows[0]:
        raise UserError(f"--out {path} is not a sweep's CSV: it has no column key; name another file")
    return rows


def append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row in one write under a lock. A file that is new gets the header; a file of an older version may lack
    columns, and then the row has only the columns of the file."""
    text = io.StringIO()
    with path.open("a+", newline="", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        there = next(csv.reader(handle), None)
        handle.seek(0, io.SEEK_END)
        writer = csv.DictWriter(text, there or list(row), extrasaction="ignore")
        if there is None:
            writer.writeheader()
        writer.writerow(row)
        handle.write(text.getvalue())
        handle.flush()


def _as_result(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Medians of each run's repeats, in the format that ``bench.gate`` compares."""
    return {"environment": environment(), "rows": list(_gate_rows(rows))}


def _gate_rows(rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        layout = " ".join(f"{name}{row[name]}" for name in ("dp", "tp", "pp", "cp", "vpp"))
        shape = (
            f"{row['model']} s{row['seq_length_tokens']} b{row['global_batch_size']}/{row['micro_batch_size']} {layout}"
        )
        groups.setdefault((row["series"], shape, row["precision"]), []).append(float(row["step_time_s"]))
    for (series, shape, precision), times in groups.items():
        yield {
            "operator": "scaling", "shape": shape, "dtype": precision, "mode": series, "provider": "ours",
            "median_ms": 1e3 * statistics.median(times),
        }  # fmt: skip
