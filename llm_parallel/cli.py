"""The command ``llm-parallel``. Every command imports what it needs only when it is used."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llm_launch.submit_request import SubmitRequest
from llm_parallel.bench.requests import CommRequest, KernelsRequest, ScalingRequest, StepRequest
from llm_parallel.errors import EXIT_USER_ERROR, UserError
from llm_parallel.goodput.request import GoodputRequest
from llm_parallel.options import with_options
from llm_parallel.planner.request import PlanRequest
from llm_parallel.quiet import quiet_libraries
from llm_parallel.report.request import ReportRequest
from llm_parallel.versions import refuse_unsupported

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="3D-parallel training of large language models, from raw text to a model that answers.",
)

bench = typer.Typer(no_args_is_help=True, help="Measure kernels and training steps.")
app.add_typer(bench, name="bench")

WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=WITH_OVERRIDES)
def pretrain(
    context: typer.Context,
    run_file: Annotated[str, typer.Argument(help="YAML run file; any field is overridden by section.field=value.")],
    dry_run: Annotated[
        bool, typer.Option(help="Print configuration, ranks and memory of the run; start nothing.")
    ] = False,
) -> None:
    """Train on next-token prediction. Starts the run's processes here, or is one of them under torchrun or srun."""
    from llm_parallel.worker.command import pretrain_command

    raise typer.Exit(pretrain_command(run_file, context.args, dry_run))


@app.command(context_settings=WITH_OVERRIDES)
def launch(
    context: typer.Context,
    run_file: Annotated[str, typer.Argument(help="YAML run file; any field is overridden by section.field=value.")],
    processes: Annotated[
        int | None, typer.Option(help="Devices to use; more than the layout needs are spares. Default: the layout's.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Agents among which this machine's devices are dealt. Default: one.")
    ] = None,
) -> None:
    """Train as pretrain does, and go on when a process, a device or a node fails. In a SLURM job's batch script it runs
    on all of the job's nodes."""
    from llm_parallel.worker.launch import launch_command

    raise typer.Exit(launch_command(run_file, context.args, processes, nodes, os.environ))


@app.command(context_settings=WITH_OVERRIDES)
@with_options
def submit(
    context: typer.Context,
    run_file: Annotated[str, typer.Argument(help="YAML run file; any field is overridden by section.field=value.")],
    request: SubmitRequest,
    dry_run: Annotated[bool, typer.Option(help="Print the batch file; submit nothing.")] = False,
) -> None:
    """Hand a run to SLURM: it survives failing GPUs and nodes, and goes back to the queue at its time limit."""
    from llm_parallel.worker.launch import submit_command

    raise typer.Exit(submit_command(run_file, context.args, request, dry_run))


@app.command()
@with_options
def plan(request: PlanRequest) -> None:
    """Predict step time, memory and cost of every layout of a model on a cluster; the best first."""
    from llm_parallel.planner.command import plan_command

    raise typer.Exit(plan_command(request))


@app.command()
def drill(
    run_file: Annotated[str, typer.Argument(help="YAML run file of a small model whose data is here.")],
    folder: Annotated[str, typer.Option(help="Where the runs go.")] = "runs/drill",
    blame: Annotated[int, typer.Option(help="Short runs with one random fault each, whose culprit is known.")] = 10,
    soak_s: Annotated[float, typer.Option(help="Seconds of one run with faults all the time; 0: none.")] = 0.0,
    every_s: Annotated[float, typer.Option(help="Mean seconds between the faults of the soak.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of what fails, where and when.")] = 0,
) -> None:
    """Break real runs of four processes on this machine in random ways, and see that they go on and blame rightly."""
    from llm_launch.drill import drill_command

    raise typer.Exit(drill_command(Path(run_file), Path(folder), blame, soak_s, every_s, seed))


@app.command()
def status(run_dir: Annotated[str, typer.Argument(help="Folder of a run that `launch` started.")]) -> None:
    """Show an elastic run's state, nodes, excluded devices and goodput."""
    from rich.console import Console

    from llm_launch.show import show_status

    show_status(Path(run_dir), Console())


@app.command()
def events(run_dir: Annotated[str, typer.Argument(help="Folder of a run.")]) -> None:
    """Show what happened to a run, line by line."""
    from llm_launch.show import timeline

    for line in timeline(Path(run_dir)):
        typer.echo(line)


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or globs: .txt, .jsonl, .jsonl.gz, .jsonl.zst …")],
    out: Annotated[str, typer.Option(help="Prefix of the .bin/.idx pair to write.")],
    tokenizer: Annotated[str | None, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json.")] = None,
    train_vocab: Annotated[int | None, typer.Option(help="Train a tokenizer of that many tokens first.")] = None,
    key: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes; all cores if not given.")] = None,
    append_eod: Annotated[bool, typer.Option(help="End every document with the end-of-document token.")] = True,
    shard_megabytes: Annotated[int, typer.Option(help="Text of one shard: what is redone after a kill.")] = 16,
) -> None:
    """Turn raw text into a tokenizer and token files. Started again after a kill, it goes on where it was."""
    from llm_parallel.data.command import prepare_command

    prepare_command(
        inputs, out, tokenizer=tokenizer, train_vocab=train_vocab, key=key, workers=workers,
        append_eod=append_eod, shard_megabytes=shard_megabytes,
    )  # fmt: skip


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, or a run, checkpoints or iter_… folder of ours.")],
    target: Annotated[str, typer.Argument(help="Folder to write; the other kind.")],
    verify: Annotated[
        bool, typer.Option(help="Compare logits before and after, and print the largest difference.")
    ] = True,
    max_shard_gb: Annotated[float, typer.Option(help="Largest safetensors file, in GB.")] = 5.0,
) -> None:
    """Convert between Hugging Face Llama folders and our checkpoints, either way."""
    from llm_parallel.convert.command import convert_command

    convert_command(source, target, verify=verify, max_shard_gb=max_shard_gb)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Run, checkpoints, iter_… or Hugging Face folder.")],
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest token each time (greedy).")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write on from a prompt."""
    from llm_parallel.generate.command import generate_command

    generate_command(
        checkpoint, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, device=device,
    )  # fmt: skip


@app.command()
def plot(run_dirs: Annotated[list[str], typer.Argument(help="Run folders; several are drawn together.")]) -> None:
    """Draw loss, throughput and learning rate of runs as PNG files."""
    from llm_parallel.metrics.plots import compare_runs, plot_run

    folders = [Path(folder) for folder in run_dirs]
    pictures = plot_run(folders[0]) if len(folders) == 1 else compare_runs(folders, folders[0] / "plots")
    for picture in pictures:
        typer.echo(str(picture))


@app.command()
@with_options
def report(request: ReportRequest) -> None:
    """One HTML page of runs and sweeps: curves, time split, recoveries, scaling efficiency. It needs no network."""
    from llm_parallel.report.command import report_command

    raise typer.Exit(report_command(request))


@app.command()
def fields(section: Annotated[str, typer.Argument(help="Show only fields that begin so.")] = "") -> None:
    """List every configuration field with its type, default and meaning."""
    from llm_parallel.config.fields import describe_fields

    found = [doc for doc in describe_fields() if doc.name.startswith(section)]
    if not found:
        sections = sorted({doc.name.split(".")[0] for doc in describe_fields() if "." in doc.name})
        raise UserError(f"no field begins with {section!r}; the sections are {', '.join(sections)}")
    for doc in found:
        given = "must be given" if doc.default is ... else f"= {doc.default}"
        typer.echo(f"{doc.name}: {doc.type} {given}\n    {doc.doc}")


@app.command(context_settings=WITH_OVERRIDES)
def quickstart(
    context: typer.Context,
    folder: Annotated[str, typer.Option(help="Where token files and the run go.")] = "runs/quickstart",
) -> None:
    """From this machine's Python library to a small trained Llama: prepare, pretrain with TP 2 x PP 2, generate."""
    from llm_parallel.quickstart import quickstart_command

    raise typer.Exit(quickstart_command(Path(folder), context.args))


@app.command()
@with_options
def goodput(request: GoodputRequest) -> None:
    """What failures cost: goodput by formula and by simulation, best checkpoint interval, spares worth having."""
    from llm_parallel.goodput.command import goodput_command

    raise typer.Exit(goodput_command(request))


@bench.command("kernels")
@with_options
def bench_kernels(request: KernelsRequest) -> None:
    """Time every kernel beside its peers on this GPU; without one, check them and say what would be timed."""
    from llm_parallel.bench.kernels import bench_command

    raise typer.Exit(bench_command(replace(request, environment=dict(os.environ))))


@bench.command("scaling")
@with_options
def bench_scaling(request: ScalingRequest) -> None:
    """Time real training runs over world sizes and layouts; goes on where it was cut off."""
    from llm_parallel.bench.scaling import scaling_command

    raise typer.Exit(scaling_command(replace(request, environment=dict(os.environ))))


@bench.command("comm")
@with_options
def bench_comm(request: CommRequest) -> None:
    """Time collectives and point to point by size; bandwidths as nccl-tests define them. Under torchrun too."""
    from llm_parallel.bench.comm import comm_command

    raise typer.Exit(comm_command(replace(request, command=_command_line())))


@bench.command("step", context_settings=WITH_OVERRIDES)
@with_options
def bench_step(request: StepRequest) -> None:
    """Time a training step: of one device beside its peers, or of a whole layout, split by tp, cp, dp, bubble …"""
    from llm_parallel.bench.step import step_command

    raise typer.Exit(step_command(replace(request, command=_command_line())))


def _command_line() -> str:
    return " ".join(["llm-parallel", *sys.argv[1:]])


def main() -> None:
    """Runs the command. A UserError becomes one sentence on standard error, and exit status 2."""
    quiet_libraries()
    try:
        refuse_unsupported()
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None


if __name__ == "__main__":
    main()
