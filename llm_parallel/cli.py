"""The command ``llm-parallel``. Every command imports what it needs only when it is used."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import join, quote
from typing import Annotated

import typer

from llm_launch.agent_step import AgentStep
from llm_launch.drill_request import DrillRequest
from llm_launch.launch_request import LaunchRequest
from llm_launch.submit_request import SubmitRequest
from llm_parallel.annotate.request import AnnotateRequest
from llm_parallel.bench.requests import CommRequest, KernelsRequest, ScalingRequest, StepRequest
from llm_parallel.chat.request import ChatRequest
from llm_parallel.command_help import MEASURE, command
from llm_parallel.convert.request import ConvertRequest
from llm_parallel.data.request import PrepareRequest
from llm_parallel.errors import EXIT_USER_ERROR, UserError
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.goodput.request import GoodputRequest
from llm_parallel.help_page import Command, Group, explain_usage, show_version
from llm_parallel.lines import note, say
from llm_parallel.options import with_options
from llm_parallel.planner.request import PlanRequest
from llm_parallel.quiet import quiet_libraries
from llm_parallel.report.request import ReportRequest
from llm_parallel.serve.request import ServeRequest
from llm_parallel.versions import refuse_unsupported


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

WithoutStart = Annotated[
    bool, typer.Option("--dry-run", help="Show settings, ranks, memory and disk of the run; start nothing.")
]
Everything = Annotated[
    bool, typer.Option("--all", help="With --dry-run: the whole configuration and all ranks, not a selection.")
]

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="3D-parallel training of large language models, from raw text to a model that answers.",
    epilog="First steps: `llm-parallel quickstart` trains a small model on this machine in minutes. "
    "`llm-parallel COMMAND --help` has examples of every command.",
)
bench = typer.Typer(cls=Group, no_args_is_help=True, help="Measure kernels and training steps.")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show versions and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the whole program; its help is that of ``app``."""


# Data


class _Prepare(Command):
    """``prepare``, which understands the options of Megatron-LM's ``preprocess_data.py`` too."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Translates the options first."""
        from llm_parallel.data.foreign_options import translated

        return super().parse_args(ctx, translated(args))


@command(app, "prepare", cls=_Prepare)
@with_options
def prepare(request: PrepareRequest) -> None:
    """Turn raw text into a tokenizer and token files. Started again after a kill, it goes on where it was."""
    from llm_parallel.data.command import prepare_command
    from llm_parallel.screen import say_next

    report = prepare_command(**vars(request))
    data = [f"data.train={request.out}", f"data.tokenizer={report.tokenizer}"]
    say_next(join(["llm-parallel", "pretrain", "RUN.yaml", *data, "--dry-run"]))


@command(app, "check", with_overrides=True)
def check(
    run_file: RunFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Samples to show, token by token.")] = 3,
    html: Annotated[str | None, typer.Option(help="File of an HTML page with the same.")] = None,
) -> None:
    """Show conversations, preferences or prompts as the model will see them: what is trained, judged, cut, packed."""
    from llm_parallel.report.check import check_command
    from llm_parallel.screen import say_next

    trains = check_command(run_file, overrides or [], html, samples)
    say_next(join(["llm-parallel", trains, run_file, *(overrides or []), "--dry-run"]))


# Train


@command(app, "quickstart", with_overrides=True)
def quickstart(
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where token files and the runs go.")] = "runs/quickstart",
    chat: Annotated[bool, typer.Option(help="Fine-tune the model into an assistant at the end.")] = True,
    chat_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the fine-tuning.")] = None,
) -> None:
    """From this machine's Python library to a small assistant: prepare, pretrain with TP 2 x PP 2, fine-tune, ask."""
    from llm_parallel.quickstart import quickstart_command

    raise typer.Exit(quickstart_command(Path(folder), overrides or [], chat, chat_steps))


@command(app, "pretrain", with_overrides=True)
def pretrain(
    run_file: RunFile, overrides: Overrides = None, dry_run: WithoutStart = False, everything: Everything = False
) -> None:
    """Train on next-token prediction. Starts the run's processes here, or is one of them under torchrun or srun."""
    from llm_parallel.worker.command import train_command

    raise typer.Exit(train_command("pretrain", run_file, overrides or [], dry_run, everything))


@command(app, "sft", with_overrides=True)
def sft(
    run_file: RunFile, overrides: Overrides = None, dry_run: WithoutStart = False, everything: Everything = False
) -> None:
    """Fine-tune a model on conversations (chat.train), so that it answers and stops. Starts like pretrain."""
    from llm_parallel.worker.command import train_command

    raise typer.Exit(train_command("sft", run_file, overrides or [], dry_run, everything))


@command(app, "prefer", with_overrides=True)
def prefer(
    run_file: RunFile, overrides: Overrides = None, dry_run: WithoutStart = False, everything: Everything = False
) -> None:
    """Train a model by answers that are compared or judged (method.kind: dpo, kto, rrhf, reward) or that it gives
    itself (reject, grpo, ppo). Starts like pretrain."""
    from llm_parallel.worker.command import train_command

    raise typer.Exit(train_command("prefer", run_file, overrides or [], dry_run, everything))


@command(app, "annotate")
@with_options
def annotate(request: AnnotateRequest) -> None:
    """Let people judge answers on a page in the browser; their judgements become records that prefer and sft read."""
    from llm_parallel.annotate.command import annotate_command

    raise typer.Exit(annotate_command(request))


@command(app, "launch", with_overrides=True)
@with_options
def launch(run_file: RunFile, request: LaunchRequest, step: AgentStep, overrides: Overrides = None) -> None:
    """Train as pretrain does, and go on when a process, device or node fails; in a SLURM job on all of its nodes."""
    from llm_parallel.worker.launch import launch_command

    raise typer.Exit(launch_command(run_file, overrides or [], request, step, os.environ))


@command(app, "submit", with_overrides=True)
@with_options
def submit(
    run_file: RunFile,
    request: SubmitRequest,
    step: AgentStep,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Check the run and print the batch file; submit nothing.")] = False,
) -> None:
    """Hand a run to SLURM: it survives failing GPUs and nodes, and goes back to the queue at its time limit."""
    from llm_parallel.worker.launch import submit_command

    raise typer.Exit(submit_command(run_file, overrides or [], (request, step), dry_run, os.environ))


# Operate


@command(app, "status")
def status(run_dir: Annotated[str, typer.Argument(help="Folder of a run.")]) -> None:
    """Show what a run is doing: state, step, loss, time left; of an elastic run also nodes, devices and goodput."""
    from rich.console import Console

    from llm_launch.show import show_status
    from llm_parallel.screen import say_next

    say_next(show_status(Path(run_dir), Console(highlight=False)))


@command(app, "events")
def events(
    run_dir: Annotated[str, typer.Argument(help="Folder of a run.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with events to come, until the run ends.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as it is in events.jsonl.")] = False,
) -> None:
    """Show what happened to a run, line by line, with the time of day."""
    from llm_launch.show import show_events
    from llm_parallel.screen import say_next

    with suppress(KeyboardInterrupt):
        show_events(Path(run_dir), follow, as_json, typer.echo if as_json else say)
    if not as_json:
        say_next(f"llm-parallel status {quote(run_dir)}")


@command(app, "drill")
@with_options
def drill(request: DrillRequest) -> None:
    """Break real runs of four processes on this machine in random ways, and see that they go on and blame rightly."""
    from llm_launch.drill import drill_command
    from llm_parallel.screen import say_next

    status = drill_command(request)
    say_next(f"llm-parallel drill {quote(str(request.run_file))} --seed {request.seed + 1}")
    raise typer.Exit(status)


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
    from llm_parallel.config.show_fields import show_fields

    show_fields(section)


@command(app, "schema")
def schema() -> None:
    """Print the JSON schema of run files, by which editors complete and check them."""
    from llm_parallel.config.schema import SCHEMA_HINT, schema_text
    from llm_parallel.screen import say_next

    typer.echo(schema_text())
    say_next(SCHEMA_HINT)


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
    from llm_parallel.metrics.plot_command import plot_command

    plot_command(run_dirs)


@command(app, "report")
@with_options
def report(request: ReportRequest) -> None:
    """One HTML page of runs and sweeps: curves, time split, recoveries, scaling efficiency. It needs no network."""
    from llm_parallel.report.command import report_command
    from llm_parallel.screen import say_next

    status = report_command(request)
    say_next(
        f'llm-parallel generate {quote(str(request.runs[0]))} --prompt "…"'
        if request.runs
        else "llm-parallel plan --validate"
    )
    raise typer.Exit(status)


# Use


@command(app, "generate")
@with_options
def generate(request: GenerateRequest) -> None:
    """Write on from prompts, or answer a file of prompts or conversations."""
    from llm_parallel.generate import command as use
    from llm_parallel.screen import say_next

    if request.input is not None:
        from llm_parallel.convert.export import export_to_hf
        from llm_parallel.generate.file_command import file_command

        raise typer.Exit(file_command(request, os.environ, export_to_hf))
    use.prompts_command(request)
    if not (Path(request.checkpoint) / "config.json").exists():
        target = str(Path(request.checkpoint)).rstrip("/") + "-hf"
        say_next(f"llm-parallel convert {quote(str(request.checkpoint))} {quote(target)}")
    else:
        say_next(f"llm-parallel generate {quote(str(request.checkpoint))} --prompt … --temperature 0.7 --top-p 0.95")


@command(app, "serve")
@with_options
def serve(request: ServeRequest) -> None:
    """Serve a model to clients of OpenAI's interface over HTTP, with a chat page for the browser."""
    from llm_parallel.serve.command import serve_command

    raise typer.Exit(serve_command(request, os.environ.get("LLM_PARALLEL_API_KEYS", "")))


@command(app, "chat")
@with_options
def chat(request: ChatRequest) -> None:
    """Talk with a model in the terminal: one in this process, or one behind an address with OpenAI's interface."""
    from llm_parallel.chat.command import chat_command

    raise typer.Exit(chat_command(replace(request, environment=dict(os.environ))))


@command(app, "evaluate")
@with_options
def evaluate(request: EvaluateRequest) -> None:
    """Measure a model on benchmarks with lm-evaluation-harness, on our engine; or compare two results."""
    from llm_parallel.evaluate.command import evaluate_command

    raise typer.Exit(evaluate_command(replace(request, api_key=os.environ.get("OPENAI_API_KEY", ""))))


@command(app, "convert")
@with_options
def convert(request: ConvertRequest) -> None:
    """Convert between Hugging Face folders and our checkpoints, either way, and adapters into PEFT's files."""
    from llm_parallel.convert.command import convert_command
    from llm_parallel.screen import say_next

    written = convert_command(**vars(request))
    if (Path(written) / "adapter_config.json").exists():
        say_next(f"llm-parallel convert {quote(str(request.source))} {quote(f'{request.target}-merged')} --merge")
    else:
        say_next(f'llm-parallel generate {quote(str(request.target))} --prompt "…"')


def main() -> None:
    """Runs the command. A UserError becomes one sentence on standard error, and exit status 2; so does a wrong command
    line."""
    try:
        quiet_libraries()
        refuse_unsupported()
        status = app(standalone_mode=False)
    except KeyboardInterrupt:  # before or after the time in which click looks after it
        raise SystemExit(128 + signal.SIGINT) from None
    except UserError as error:
        note(f"error: {error}")
        raise SystemExit(EXIT_USER_ERROR) from None
    except Exception as error:
        explain_usage(error)
        raise SystemExit(EXIT_USER_ERROR) from None
    raise SystemExit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
