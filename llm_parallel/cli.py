"""The command ``llm-parallel``. Every word imports what it needs only when it is used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_parallel.errors import EXIT_USER_ERROR, UserError
from llm_parallel.quiet import quiet_libraries
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
    """Train on next-word prediction. Starts the run's processes here, or is one of them under torchrun or srun."""
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
def submit(
    context: typer.Context,
    run_file: Annotated[str, typer.Argument(help="YAML run file; any field is overridden by section.field=value.")],
    nodes: Annotated[int, typer.Option(help="Nodes that work.")],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node; 0 where there are none.")] = 8,
    spares: Annotated[int, typer.Option(help="Nodes on top of --nodes that wait to replace a failed one.")] = 0,
    min_nodes: Annotated[int | None, typer.Option(help="Fewest nodes to start with; --nodes if not given.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as 3-00:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account.")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM quality of service.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; that of the run folder if not given.")] = None,
    warning_s: Annotated[int, typer.Option(help="Seconds before the time limit at which the run saves.")] = 180,
    sbatch: Annotated[list[str] | None, typer.Option(help="Further option of sbatch; may be given often.")] = None,
    template: Annotated[str | None, typer.Option(help="Batch file of your own with {options} and {command}.")] = None,
    array: Annotated[str | None, typer.Option(help="One run for each value of a field, as optim.lr=1e-4,3e-4.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the batch file; submit nothing.")] = False,
) -> None:
    """Hand a run to SLURM: it survives failing GPUs and nodes, and goes back to the queue at its time limit."""
    from llm_launch.submit import SubmitRequest
    from llm_parallel.worker.launch import submit_command

    request = SubmitRequest(
        nodes, gpus_per_node, spares, time, partition, account, qos, name, warning_s, sbatch or (), template, min_nodes,
        array,
    )  # fmt: skip
    raise typer.Exit(submit_command(run_file, context.args, request, dry_run))


@app.command()
def plan(
    model: Annotated[str | None, typer.Option(help="Model preset, as llama2-70b.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="dgx-a100, dgx-h100 (the default), dgx-h200 …, or a YAML file like theirs.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs to use.")] = 8,
    global_batch: Annotated[int, typer.Option(help="Samples of a step.")] = 1024,
    seq: Annotated[int, typer.Option(help="Tokens of a sample.")] = 4096,
    top: Annotated[int, typer.Option(help="Layouts to show.")] = 5,
    precision: Annotated[str, typer.Option(help="bf16, or fp8 for a what-if.")] = "bf16",
    tokens: Annotated[float | None, typer.Option(help="Tokens of the whole run, for days, GPU-hours and cost.")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    explain: Annotated[str | None, typer.Option(help="One layout in detail, as tp=8,pp=4,mbs=1.")] = None,
    write: Annotated[str | None, typer.Option(help="Run file to make of the best layout.")] = None,
    json: Annotated[str | None, typer.Option(help="Write the layouts, or the validation, as JSON.")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Score predictions against published rows.")] = False,
    rows: Annotated[str | None, typer.Option(help="With --validate: CSV of your own rows.")] = None,
    refit: Annotated[str | None, typer.Option(help="Fit the constants anew and write them to this JSON file.")] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="JSON of bench comm, kernels or step on your cluster; several times.")
    ] = None,
    cluster_out: Annotated[str, typer.Option(help="With --calibrate: description to write.")] = "my-cluster.yaml",
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="A case to set beside: gpus=512, cluster=dgx-h200, seq=131072 …; several times."),
    ] = None,
    software: Annotated[str, typer.Option(help="ours, or nvidia: Megatron-Core, Transformer Engine.")] = "ours",
) -> None:
    """Predict step time, memory and cost of every layout of a model on a cluster; the best first."""
    from llm_parallel.errors import UserError
    from llm_parallel.planner import command as planner

    if validate:
        raise typer.Exit(planner.validate_command(rows, json))
    if refit:
        raise typer.Exit(planner.refit_command(refit))
    if calibrate:
        from llm_parallel.planner.calibrate import calibrate_command

        raise typer.Exit(calibrate_command(calibrate, cluster, cluster_out))
    if model is None:
        raise UserError("plan needs --model, as llama2-70b, --validate, or --calibrate")
    request = planner.Request(
        model,
        cluster or "dgx-h100",
        gpus,
        global_batch,
        seq,
        top,
        precision,
        tokens,
        price_per_gpu_hour,
        explain,
        write,
        json,
        what_if or (),
        software,
    )
    raise typer.Exit(planner.plan_command(request))


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
    train_vocab: Annotated[int | None, typer.Option(help="Train a tokenizer of that many words first.")] = None,
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
    temperature: Annotated[float, typer.Option(help="0 for the likeliest word each time (greedy).")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest words; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest words that together have this share.")] = 1.0,
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
def report(
    run_dirs: Annotated[list[str] | None, typer.Argument(help="Run folders, shown together.")] = None,
    csv: Annotated[list[str] | None, typer.Option(help="CSV of a scaling sweep; may be given several times.")] = None,
    out: Annotated[str, typer.Option(help="Page to write.")] = "report.html",
    png: Annotated[str | None, typer.Option(help="Folder for PNGs of the figures.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
) -> None:
    """One HTML page of runs and sweeps: curves, time split, recoveries, scaling efficiency. It needs no network."""
    from llm_parallel.report.command import Request, report_command

    raise typer.Exit(report_command(Request(run_dirs or [], csv or [], out, png, title)))


@app.command()
def fields(section: Annotated[str, typer.Argument(help="Show only fields that begin so.")] = "") -> None:
    """List every configuration field with its type, default and meaning."""
    from llm_parallel.config.fields import describe_fields

    for doc in describe_fields():
        if doc.name.startswith(section):
            typer.echo(f"{doc.name}: {doc.type} = {doc.default}\n    {doc.doc}")


@app.command(context_settings=WITH_OVERRIDES)
def quickstart(
    context: typer.Context,
    folder: Annotated[str, typer.Option(help="Where token files and the run go.")] = "runs/quickstart",
) -> None:
    """From this machine's Python library to a small trained Llama: prepare, pretrain with TP 2 x PP 2, generate."""
    from llm_parallel.quickstart import quickstart_command

    raise typer.Exit(quickstart_command(Path(folder), context.args))


@app.command()
def goodput(
    gpus: Annotated[int | None, typer.Option(help="GPUs of the job; without it only the table of sizes.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Fleet whose failure rate is taken: llama3, rsc1, rsc2, opt175b or deck.")
    ] = None,
    rate_per_gpu_month: Annotated[float | None, typer.Option(help="Or: failures per GPU and month, in %.")] = None,
    detect_s: Annotated[float, typer.Option(help="Seconds until a failure is known.")] = 60.0,
    restart_s: Annotated[float, typer.Option(help="Seconds from there until training goes on.")] = 300.0,
    checkpoint_write_s: Annotated[float, typer.Option(help="Seconds for which a checkpoint stops training.")] = 30.0,
    interval: Annotated[str, typer.Option(help="Seconds between checkpoints, or auto for the best.")] = "auto",
    spares: Annotated[int | None, typer.Option(help="Spare nodes; the best number if not given.")] = None,
    policy: Annotated[
        str, typer.Option(help="Without a spare: restart on the same nodes, wait for repair, or shrink.")
    ] = "restart",
    repair_h: Annotated[float, typer.Option(help="Mean hours until a broken node is back.")] = 24.0,
    hardware_share: Annotated[
        float | None, typer.Option(help="Share of failures that take a node out; the profile's if not given.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    replica_gpus: Annotated[int | None, typer.Option(help="GPUs of one model replica, for shrink; one node's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
    out: Annotated[str | None, typer.Option(help="Prefix of the JSON and PNG files.")] = None,
    step_s: Annotated[float, typer.Option(help="Seconds of a step, which an elastic job loses at most.")] = 10.0,
    claims: Annotated[bool, typer.Option("--claims", help="Recompute well-known claims about failing GPUs.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Hold the formulas against published figures.")] = False,
) -> None:
    """What failures cost: goodput by formula and by simulation, best checkpoint interval, spares worth having."""
    from llm_parallel.goodput.command import Request, claims_command, goodput_command, validate_command

    if claims or validate:
        raise typer.Exit(claims_command() if claims else validate_command())
    request = Request(
        gpus, profile, rate_per_gpu_month, detect_s, restart_s, checkpoint_write_s, interval, spares, policy,
        repair_h, hardware_share, gpus_per_node, replica_gpus, seed, out, step_s,
    )  # fmt: skip
    raise typer.Exit(goodput_command(request))


@bench.command("kernels")
def bench_kernels(
    op: Annotated[list[str] | None, typer.Option(help="Operator; may be given several times. All if none.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Part of a shape's name, for example llama3-8b.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; each operator's own if not given.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each provider.")] = 20,
    out: Annotated[str | None, typer.Option(help="Prefix of result files; with --aot the JSON file.")] = None,
    baseline: Annotated[str | None, typer.Option(help="JSON of an earlier run to hold this one against.")] = None,
    min_ratio: Annotated[float, typer.Option(help="Least speed relative to the baseline.")] = 0.95,
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile for A100 and H100, no GPU needed; show the code.")
    ] = False,
    arch: Annotated[list[int] | None, typer.Option(help="With --aot: 80 or 90; both if not given.")] = None,
    jobs: Annotated[int, typer.Option(help="With --aot: compiling processes.")] = 2,
    dump: Annotated[str | None, typer.Option(help="With --aot: folder for SASS, PTX and TTGIR.")] = None,
) -> None:
    """Time every kernel beside its peers on this GPU; without one, check them and say what would be timed."""
    from llm_parallel.bench.kernels import Request, aot_command, bench_command

    if aot:
        raise typer.Exit(aot_command(op or [], arch or [], jobs, out, dump))
    request = Request(op or [], shape or [], dtype, rounds, out, baseline, min_ratio, dict(os.environ))
    raise typer.Exit(bench_command(request))


@bench.command("scaling")
def bench_scaling(
    sweep: Annotated[str, typer.Argument(help="YAML file with a base run file and series of overrides.")],
    out: Annotated[str | None, typer.Option(help="CSV to add to; beside the sweep if not given.")] = None,
    index: Annotated[int | None, typer.Option(help="Make only this run, as $SLURM_ARRAY_TASK_ID.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would run.")] = False,
    cluster: Annotated[str | None, typer.Option(help="Cluster or YAML file that the planner predicts with.")] = None,
    baseline: Annotated[str | None, typer.Option(help="JSON of an earlier sweep to hold this one against.")] = None,
    min_ratio: Annotated[float, typer.Option(help="Least speed relative to the baseline or published figure.")] = 0.95,
) -> None:
    """Time real training runs over world sizes and layouts; goes on where it was cut off."""
    from llm_parallel.bench.scaling import Request, scaling_command

    raise typer.Exit(
        scaling_command(Request(sweep, dict(os.environ), out, index, dry_run, cluster, baseline, min_ratio))
    )


@bench.command("comm")
def bench_comm(
    ops: Annotated[str, typer.Option(help="With commas: all_reduce, all_gather, reduce_scatter, all_to_all …")] = "",
    sizes: Annotated[str | None, typer.Option(help="As 8K,1M or from:to:factor, 8K:1G:4.")] = None,
    processes: Annotated[int | None, typer.Option(help="Processes here; one per GPU, or 2, if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu (gloo) or cuda (NCCL).")] = "auto",
    rounds: Annotated[int, typer.Option(help="Times that each operation and size is measured.")] = 11,
    out: Annotated[str | None, typer.Option(help="Prefix of the JSON and CSV files.")] = None,
    baseline: Annotated[str | None, typer.Option(help="JSON of an earlier run to hold this one against.")] = None,
    min_ratio: Annotated[float, typer.Option(help="Least speed relative to the baseline.")] = 0.95,
) -> None:
    """Time collectives and point to point by size; bandwidths as nccl-tests define them. Under torchrun too."""
    from llm_parallel.bench.comm import Request, comm_command

    names = [name for name in ops.split(",") if name]
    command = " ".join(["llm-parallel", *sys.argv[1:]])
    raise typer.Exit(
        comm_command(Request(names, sizes, processes, device, rounds, out, baseline, min_ratio, command=command))
    )


@bench.command("step", context_settings=WITH_OVERRIDES)
def bench_step(
    arguments: Annotated[list[str] | None, typer.Argument(help="Run file, and section.field=value overrides.")] = None,
    model: Annotated[str | None, typer.Option(help="Model preset, for example llama3-8b.")] = None,
    providers: Annotated[
        str, typer.Option(help="With commas: ours, transformers …; of replicas: ours, ddp, fsdp.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Times that each contender is measured.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of one measurement.")] = 2,
    processes: Annotated[int | None, typer.Option(help="Of a layout; as parallel says if not given.")] = None,
    trace: Annotated[str | None, typer.Option(help="Folder for Chrome traces of one step of each.")] = None,
    out: Annotated[str | None, typer.Option(help="Prefix of the JSON and CSV files.")] = None,
    baseline: Annotated[str | None, typer.Option(help="JSON of an earlier run to hold this one against.")] = None,
    min_ratio: Annotated[float, typer.Option(help="Least speed relative to the baseline.")] = 0.95,
) -> None:
    """Time a training step: of one device beside its peers, or of a whole layout, split by tp, cp, dp, bubble …"""
    from llm_parallel.bench.step import Request, step_command

    names = [name for name in providers.split(",") if name]
    command = " ".join(["llm-parallel", *sys.argv[1:]])
    raise typer.Exit(
        step_command(
            Request(
                arguments or [],
                model,
                names,
                rounds,
                steps,
                trace,
                out,
                baseline,
                min_ratio,
                processes,
                command=command,
            )
        )
    )


def main() -> None:
    """Runs the command; what the user can mend is one sentence and exit status 2."""
    quiet_libraries()
    try:
        refuse_unsupported()
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None


if __name__ == "__main__":
    main()
