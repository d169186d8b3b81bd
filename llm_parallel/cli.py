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
from llm_parallel.command_help import MEASURE, command
from llm_parallel.errors import EXIT_USER_ERROR, UserError
from llm_parallel.goodput.request import GoodputRequest
from llm_parallel.options import with_options
from llm_parallel.planner.request import PlanRequest
from llm_parallel.quiet import quiet_libraries
from llm_parallel.report.request import ReportRequest
from llm_parallel.versions import refuse_unsupported


def _show_version(wanted: bool) -> None:
    if wanted:
        from llm_parallel.metrics.run import installed_versions

        typer.echo("\n".join(f"{name} {version}" for name, version in installed_versions().items()))
        raise typer.Exit


def complete_field(incomplete: str) -> list[str]:
    """Names of configuration fields that begin as ``incomplete`` does, for the shell's completion."""
    from llm_parallel.config.fields import describe_fields

    named = (doc.name + ("." if doc.is_section else "=") for doc in describe_fields() if ".N." not in doc.name)
    return [name for name in named if name.startswith(incomplete)]


RunFile = Annotated[str, typer.Argument(help="YAML run file; any field is overridden by section.field=value.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.field=value",
        help="Values that replace those of the run file; `llm-parallel fields` lists them.",
        autocompletion=complete_field,
    ),
]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="3D-parallel training of large language models, from raw text to a model that answers.",
    epilog="First steps: `llm-parallel quickstart` trains a small model on this machine in minutes. "
    "`llm-parallel COMMAND --help` has examples of every command.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure kernels and training steps.")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show versions and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the whole program; its help is that of ``app``."""


# Data


@command(app, "prepare")
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs: text, JSON lines, JSON, Parquet, Arrow, CSV; plain or in gz, zst, xz, bz2."
        ),
    ],
    out: Annotated[str, typer.Option(help="Prefix of the .bin/.idx pair to write.")],
    tokenizer: Annotated[str | None, typer.Option(help="SentencePiece .model or Hugging Face tokenizer.json.")] = None,
    train_vocab: Annotated[int | None, typer.Option(help="Train a tokenizer of that many tokens first.")] = None,
    key: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes; all cores if not given.")] = None,
    append_eod: Annotated[bool, typer.Option(help="End every document with the end-of-document token.")] = True,
    shard_megabytes: Annotated[int, typer.Option(help="Text of one shard: what is redone after a kill.")] = 16,
    prepend_bos: Annotated[bool, typer.Option(help="Begin every document with the tokenizer's begin token.")] = False,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad record instead of leaving it out.")] = False,
) -> None:
    """Turn raw text into a tokenizer and token files. Started again after a kill, it goes on where it was."""
    from llm_parallel.data.command import prepare_command

    prepare_command(
        inputs, out, tokenizer=tokenizer, train_vocab=train_vocab, key=key, workers=workers,
        append_eod=append_eod, shard_megabytes=shard_megabytes, prepend_bos=prepend_bos, strict=strict,
    )  # fmt: skip


@command(app, "check", with_overrides=True)
def check(
    run_file: RunFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Samples to show, token by token.")] = 3,
    html: Annotated[str | None, typer.Option(help="File of an HTML page with the same.")] = None,
) -> None:
    """Show the conversations of a run as the model will see them: what is trained, cut, packed, and where it stops."""
    from llm_parallel.report.check import check_command

    raise typer.Exit(check_command(run_file, overrides or [], html, samples))


# Train


@command(app, "quickstart", with_overrides=True)
def quickstart(
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where token files and the run go.")] = "runs/quickstart",
) -> None:
    """From this machine's Python library to a small trained Llama: prepare, pretrain with TP 2 x PP 2, generate."""
    from llm_parallel.quickstart import quickstart_command

    raise typer.Exit(quickstart_command(Path(folder), overrides or []))


@command(app, "pretrain", with_overrides=True)
def pretrain(
    run_file: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print configuration, ranks and memory of the run; start nothing.")
    ] = False,
) -> None:
    """Train on next-token prediction. Starts the run's processes here, or is one of them under torchrun or srun."""
    from llm_parallel.worker.command import train_command

    raise typer.Exit(train_command("pretrain", run_file, overrides or [], dry_run))


@command(app, "sft", with_overrides=True)
def sft(
    run_file: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="Prepare the conversations, print configuration, ranks and memory; start nothing.")
    ] = False,
) -> None:
    """Fine-tune a model on conversations (chat.train), so that it answers and stops. Starts like pretrain."""
    from llm_parallel.worker.command import train_command

    raise typer.Exit(train_command("sft", run_file, overrides or [], dry_run))


@command(app, "launch", with_overrides=True)
def launch(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(help="Devices to use; more than the layout needs are spares. Default: the layout's.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Agents among which this machine's devices are dealt. Default: one.")
    ] = None,
) -> None:
    """Train as pretrain does, and go on when a process, device or node fails; in a SLURM job on all of its nodes."""
    from llm_parallel.worker.launch import launch_command

    raise typer.Exit(launch_command(run_file, overrides or [], processes, nodes, os.environ))


@command(app, "submit", with_overrides=True)
@with_options
def submit(
    run_file: RunFile,
    request: SubmitRequest,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print the batch file; submit nothing.")] = False,
) -> None:
    """Hand a run to SLURM: it survives failing GPUs and nodes, and goes back to the queue at its time limit."""
    from llm_parallel.worker.launch import submit_command

    raise typer.Exit(submit_command(run_file, overrides or [], request, dry_run))


# Operate


@command(app, "status")
def status(run_dir: Annotated[str, typer.Argument(help="Folder of a run that `launch` started.")]) -> None:
    """Show an elastic run's state, nodes, excluded devices and goodput."""
    from rich.console import Console

    from llm_launch.show import show_status

    show_status(Path(run_dir), Console())


@command(app, "events")
def events(run_dir: Annotated[str, typer.Argument(help="Folder of a run.")]) -> None:
    """Show what happened to a run, line by line."""
    from llm_launch.show import timeline

    for line in timeline(Path(run_dir)):
        typer.echo(line)


@command(app, "drill")
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


# Plan


@command(app, "plan")
@with_options
def plan(request: PlanRequest) -> None:
    """Predict step time, memory and cost of every layout of a model on a cluster; the best first."""
    from llm_parallel.planner.command import plan_command

    raise typer.Exit(plan_command(request))


@command(app, "goodput")
@with_options
def goodput(request: GoodputRequest) -> None:
    """What failures cost: goodput by formula and by simulation, best checkpoint interval, spares worth having."""
    from llm_parallel.goodput.command import goodput_command

    raise typer.Exit(goodput_command(request))


@command(app, "fields")
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


# Measure

app.add_typer(bench, name="bench", rich_help_panel=MEASURE)


@command(bench, "kernels", within="bench")
@with_options
def bench_kernels(request: KernelsRequest) -> None:
    """Time every kernel beside its peers on this GPU; without one, check them and say what would be timed."""
    from llm_parallel.bench.kernels import bench_command

    raise typer.Exit(bench_command(replace(request, environment=dict(os.environ))))


@command(bench, "scaling", within="bench")
@with_options
def bench_scaling(request: ScalingRequest) -> None:
    """Time real training runs over world sizes and layouts; goes on where it was cut off."""
    from llm_parallel.bench.scaling import scaling_command

    raise typer.Exit(scaling_command(replace(request, environment=dict(os.environ))))


@command(bench, "comm", within="bench")
@with_options
def bench_comm(request: CommRequest) -> None:
    """Time collectives and point to point by size; bandwidths as nccl-tests define them. Under torchrun too."""
    from llm_parallel.bench.comm import comm_command

    raise typer.Exit(comm_command(replace(request, command=_command_line())))


@command(bench, "step", within="bench", with_overrides=True)
@with_options
def bench_step(request: StepRequest) -> None:
    """Time a training step: of one device beside its peers, or of a whole layout, split by tp, cp, dp, bubble …"""
    from llm_parallel.bench.step import step_command

    raise typer.Exit(step_command(replace(request, command=_command_line())))


def _command_line() -> str:
    return " ".join(["llm-parallel", *sys.argv[1:]])


@command(app, "plot")
def plot(run_dirs: Annotated[list[str], typer.Argument(help="Run folders; several are drawn together.")]) -> None:
    """Draw loss, throughput and learning rate of runs as PNG files."""
    from llm_parallel.metrics.plots import compare_runs, plot_run

    folders = [Path(folder) for folder in run_dirs]
    pictures = plot_run(folders[0]) if len(folders) == 1 else compare_runs(folders, folders[0] / "plots")
    for picture in pictures:
        typer.echo(str(picture))


@command(app, "report")
@with_options
def report(request: ReportRequest) -> None:
    """One HTML page of runs and sweeps: curves, time split, recoveries, scaling efficiency. It needs no network."""
    from llm_parallel.report.command import report_command

    raise typer.Exit(report_command(request))


# Use


@command(app, "generate")
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


@command(app, "convert")
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, or a run, checkpoints or iter_… folder of ours.")],
    target: Annotated[str, typer.Argument(help="Folder to write; the other kind.")],
    verify: Annotated[
        bool, typer.Option(help="Compare logits before and after, and print the largest difference.")
    ] = True,
    max_shard_gb: Annotated[float, typer.Option(help="Largest safetensors file, in GB.")] = 5.0,
    merge: Annotated[
        bool, typer.Option(help="Add adapters to the model under them, instead of writing a PEFT folder.")
    ] = False,
) -> None:
    """Convert between Hugging Face Llama folders and our checkpoints, either way, and adapters into PEFT's files."""
    from llm_parallel.convert.command import convert_command

    convert_command(source, target, verify=verify, max_shard_gb=max_shard_gb, merge=merge)


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
