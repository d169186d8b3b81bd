"""``llm-parallel plan``: the best layouts of a model, what they take, and the expected error of these predictions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from pydantic import ValidationError

from llm_parallel.config.rules import find_problems
from llm_parallel.config.schema import SCHEMA_LINE, write_schema
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.goodput.closed_form import best_interval_s, goodput
from llm_parallel.goodput.rates import Job, find_profile
from llm_parallel.planner.advice import TIGHT, is_tight, would_fit
from llm_parallel.planner.explained import check_ep, explained
from llm_parallel.planner.hardware import Cluster, load_cluster, with_network
from llm_parallel.planner.memory import CONTEXT_BYTES, GIB
from llm_parallel.planner.models import planned
from llm_parallel.planner.published.command import refit_command, validate_command
from llm_parallel.planner.published.trust import trust
from llm_parallel.planner.request import PlanRequest, Question, read_length
from llm_parallel.planner.run_file import about_documents, own_layout, question_of, with_documents
from llm_parallel.planner.search import Candidate, as_run_fields, best_layouts, evaluate, fits
from llm_parallel.planner.shapes import RECOMPUTES, SOFTWARE_NAMES, Shape, Strategy, strategy_of, with_software
from llm_parallel.planner.steptime import Model
from llm_parallel.screen import say_next, show

HOUR_S = 3600.0
_WHAT_IF = ("cluster", "network", "gpus", "global_batch", "seq", "precision", "software")


def plan_command(request: PlanRequest) -> int:
    """Does what the request asks; exit status 1 if no layout fits. Raises UserError for what can't be planned."""
    if request.validate:
        return validate_command(request.rows, request.json, request.all)
    if request.refit:
        return refit_command(request.refit)
    if request.calibrate:
        from llm_parallel.planner.calibrate import calibrate_command  # imports scipy

        return calibrate_command(request.calibrate, request.cluster, request.cluster_out)
    return _plan(question_of(request))


def _plan(request: Question) -> int:
    """Prints the best layouts; 1 if none fits."""
    if request.what_if:
        return what_if_command(request)
    model, cluster = planned(request.model), with_network(load_cluster(request.cluster_name), request.network)
    request, shape = replace(request, model=model.given), model.shape
    _check_experts(request, shape)
    base = _base(request, cluster)
    began = time.monotonic()
    if request.explain is not None:
        strategy = explained(request.explain, base)
        _check_explained(request, shape, strategy, cluster)
        found = [evaluate(shape, strategy, cluster)]
        lines: list[str] = []
        _explain(found[0], shape, cluster, lines.append)
        show("\n".join(lines))
    else:
        found, looked, fitting = best_layouts(shape, base, cluster, request.top, RECOMPUTES[request.software])
        show(
            f"{model.name}, {shape.parameters / 1e9:.1f} B parameters, on {request.gpus} GPUs of {cluster.name}: "
            f"{looked} layouts in {time.monotonic() - began:.1f} s, {fitting} fit into "
            f"{cluster.chip.memory_bytes / GIB:.0f} GiB"
        )
        if not found:
            show(_why_none(request, looked))
            for sentence in would_fit(shape, base, cluster) if looked else ():
                show(sentence)
            return 1
        show(_table(found, shape, cluster))
    show(
        f"\nPredicted for {SOFTWARE_NAMES[request.software]}, not measured. {_trust(cluster, found[0].strategy, shape)}"
    )
    for said in (about_documents(request), own_layout(request, shape, _base(request, cluster), cluster)):
        if said:
            show(said)
    if cluster.host is not None and found[0].strategy.adapter is not None:
        show("Memory is that of adapters; times on a CPU are those of training all weights, which takes longer.")
    _say_run(request, found[0], cluster)
    if request.write:
        write_run_file(request, shape, found[0], cluster)
    if request.json:
        with atomic_write(request.json) as handle:
            json.dump([as_data(item, shape, cluster) for item in found], handle, indent=1)
    if request.write:
        say_next(f"llm-parallel pretrain {quote(str(request.write))} data.train=PREFIX data.tokenizer=FOLDER --dry-run")
    else:
        say_next(f"{_as_command(request)} --write runs/{model.name}.yaml")
    return 0


def _check_experts(request: Question, shape: Shape) -> None:
    """Raises UserError where a model with experts is asked of software, or with adapters, that has no prediction of
    them."""
    if shape.experts is not None and (request.software != "nvidia" or request.adapter or request.write):
        raise UserError(
            f"--model {request.model} has experts, which our trainer does not have; --software nvidia predicts "
            "Megatron-Core's training of all weights (without --adapter and --write)"
        )


def _as_command(request: Question) -> str:
    model = f"--model {quote(str(request.model))}" if request.run is None else quote(str(request.run))
    adapter = f" --adapter {quote(request.adapter)}" if request.adapter else ""
    return (
        f"llm-parallel plan {model} --cluster {quote(request.cluster_name)} --gpus {request.gpus} "
        f"--global-batch {request.global_batch} --seq {request.seq}{adapter}"
    )


def _why_none(request: Question, looked: int) -> str:
    if looked:
        return "None fits."
    return (
        f"No layout divides --global-batch {request.global_batch} and --seq {request.seq} over {request.gpus} GPUs; "
        "use a sequence that is a multiple of 2, and a batch that has a sample for each replica."
    )


def _trust(cluster: Cluster, strategy: Strategy, shape: Shape) -> str:
    """The error to expect of a prediction."""
    if cluster.host is not None:
        return "How far such predictions are off on a CPU is measured by benchmarks/cpu_truth.py."
    return trust(cluster, strategy, shape.experts is not None).describe()


def what_if_command(request: Question) -> int:
    """Prints the best layout of the request and of each change to it in one table; exit status 1 if none fits."""
    if request.explain or request.write:
        name = "explain" if request.explain else "write"
        raise UserError(f"--what-if compares the best layouts; leave out --{name}, or plan each case by itself")
    model = planned(request.model)
    shape = model.shape
    for text in ("", *request.what_if):
        _check_experts(changed(request, text) if text else request, shape)
    cases = [("as asked", request), *((text, changed(request, text)) for text in request.what_if)]
    rows, records = [], []
    trusted: dict[str, list[str]] = {}
    for name, case in cases:
        cluster = with_network(load_cluster(case.cluster_name), case.network)
        base = _base(case, cluster)
        found, _, _ = best_layouts(shape, base, cluster, 1, RECOMPUTES[case.software])
        said = f"Predicted for {SOFTWARE_NAMES[case.software]}, not measured. {_trust(cluster, base, shape)}"
        trusted.setdefault(said, []).append(name)
        rows.append(_what_if_row(name, case, found, shape, cluster))
        best = as_data(found[0], shape, cluster) if found else None
        records.append({"case": name, "cluster": cluster.name, "gpus": case.gpus, "seq": case.seq,
                        "global_batch": case.global_batch, "best": best})  # fmt: skip
    days = "days, GPU-hours" if request.tokens else "tokens/s in all"
    heads = ["what if", "cluster", "GPUs", "batch", "seq", "best layout", "step s", "tokens/s/GPU", "MFU full",
             "memory GiB", days]  # fmt: skip
    show(f"{model.name}, {shape.parameters / 1e9:.1f} B parameters; the best layout of each case")
    show("\n".join(["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *rows]))
    for said, names in trusted.items():
        show(f"{'; '.join(names)}: {said}" if len(trusted) > 1 else said)
    if request.json:
        with atomic_write(request.json) as handle:
            json.dump(records, handle, indent=1)
    fits_somewhere = any(record["best"] for record in records)
    if fits_somewhere:
        say_next(f"{_as_command(request)} --explain LAYOUT  (as tp=8,pp=4,mbs=1)")
    return 0 if fits_somewhere else 1


def changed(request: Question, text: str) -> Question:
    """The request with changes from a text like ``gpus=512,seq=8192``. Raises UserError for what is no change."""
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        name = name.replace("-", "_")
        if name not in _WHAT_IF or not value:
            raise UserError(f"--what-if {text}: {part!r} is not one of {', '.join(_WHAT_IF)} with a value, as gpus=512")
        if name in ("cluster", "network", "precision", "software"):
            changes[name] = value
        elif name == "seq":
            changes[name] = read_length(value)
        elif not value.isdecimal():
            raise UserError(f"--what-if {text}: {name}={value} must be a whole number of at least 1")
        else:
            changes[name] = int(value)
    if "cluster" in changes and "gpus" not in changes:
        sized = question_of(PlanRequest(cluster=changes["cluster"]))
        changes |= {"cluster": sized.cluster} | ({"gpus": sized.gpus} if sized.cluster != changes["cluster"] else {})
    return replace(request, **changes)


def _what_if_row(name: str, case: Question, found: Sequence[Candidate], shape: Shape, cluster: Cluster) -> str:
    cells = [name, cluster.name, f"{case.gpus:,}", f"{case.global_batch:,}", f"{case.seq:,}"]
    if not found:
        return "| " + " | ".join([*cells, "none fits", "", "", "", "", ""]) + " |"
    best = found[0]
    rate = best.tokens_per_s() * case.gpus
    last = _bill(case.tokens / rate, case.gpus, None) if case.tokens else f"{rate:,.0f}"
    cells += [best.strategy.describe(), f"{best.time.total:.3f}", f"{best.tokens_per_s():,.0f}",
              f"{best.mfu(shape, cluster, False):.1%}", f"{best.memory.total / GIB:.1f}", last]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _base(request: Question, cluster: Cluster) -> Strategy:
    for name in ("gpus", "global_batch", "seq", "top"):
        value = getattr(request, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("tokens", "price_per_gpu_hour"):
        amount = getattr(request, name)
        if amount is not None and not 0 < amount < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {amount:g} must be over 0 and finite, as 2e12 and 2.5")
    if request.gpus > cluster.gpus_per_node and request.gpus % cluster.gpus_per_node:
        whole = request.gpus // cluster.gpus_per_node * cluster.gpus_per_node
        raise UserError(
            f"--gpus {request.gpus} is no whole number of nodes of {cluster.gpus_per_node}; take {whole} or "
            f"{whole + cluster.gpus_per_node}"
        )
    of_run_file = request.config is not None and request.precision == request.config.train.precision
    if request.precision not in ("bf16", "fp8") and not of_run_file:
        raise UserError(f"--precision {request.precision} is not bf16 or fp8")
    if request.precision == "fp8" and cluster.chip.peak_fp8_flops <= cluster.chip.peak_flops:
        raise UserError(f"--precision fp8: {cluster.chip.name} has no 8-bit products; use bf16")
    plain = Strategy(
        gpus=request.gpus, global_batch=request.global_batch, micro_batch=1, seq=request.seq,
        precision="fp32" if cluster.host else request.precision,  # type: ignore[arg-type]
        adapter=_adapter(request.adapter, request.config),
    )  # fmt: skip
    if request.config is not None:
        own = strategy_of(request.config, request.gpus)
        plain = replace(plain, moment_bits=own.moment_bits, zero=own.zero)
    found = with_software(with_documents(request, plain), request.software)
    if found.zero > 1 and found.adapter is not None:
        raise UserError(
            f"--software {request.software} is planned for all weights; leave out --adapter, or take --software ours"
        )
    return found


def _adapter(text: str | None, config: RunConfig | None) -> AdapterConfig | None:
    if text is None:
        return None if config is None else config.adapter
    fields = dict(part.strip().partition("=")[::2] for part in text.split(","))
    try:
        return AdapterConfig.model_validate(
            {"rank": fields.pop("rank", 16), "base": fields.pop("base", "full"), **fields}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"--adapter {text}: {'.'.join(map(str, first['loc']))}: {first['msg']}; give as rank=16,base=nf4"
        ) from error


def _check_explained(request: Question, shape: Shape, strategy: Strategy, cluster: Cluster) -> None:
    """Raises UserError with the first rule of our trainer that an explained layout breaks. Megatron-Core has the same
    rules."""
    check_ep(request.explain or "", shape, strategy)
    known = replace(strategy, recompute="full") if strategy.recompute == "ops" else strategy
    config = RunConfig.model_validate(_run_tree(request, shape, known, cluster, whole=True))
    problems = find_problems(config, request.gpus, "cpu" if cluster.host else "cuda")
    if problems:
        named = {"parallel.": "", "train.micro_batch_size": "mbs", "train.global_batch_size": "--global-batch"}
        fix = {name: value for name, value in problems[0].fix.items() if name != "parallel.stage_layers"}
        use = " and ".join(f"{_renamed(name, named)}={value}" for name, value in fix.items())
        more = f"; {len(problems) - 1} more of its sizes do not fit" if len(problems) > 1 else ""
        raise UserError(f"--explain {request.explain}: {problems[0].statement}; use {use}{more}")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _table(found: Sequence[Candidate], shape: Shape, cluster: Cluster) -> str:
    lines = [
        "| layout | step s | tokens/s/GPU | MFU full | MFU causal | bubble | exposed comm. | memory GiB |",
        "|" + " --- |" * 8,
    ]
    for item in found:
        memory = f"{item.memory.total / GIB:.1f}" + (" (tight)" if is_tight(item.memory.total, cluster) else "")
        lines.append(
            f"| {item.strategy.describe()} | {item.time.total:.3f} | {item.tokens_per_s():,.0f} | "
            f"{item.mfu(shape, cluster, False):.1%} | {item.mfu(shape, cluster, True):.1%} | {item.bubble:.1%} | "
            f"{item.time.exposed_communication / item.time.total:.1%} | {memory} |"
        )
    lines.append(
        "MFU full counts square attention (Megatron-LM's papers), causal half of it; memory without CUDA context"
    )
    if any(is_tight(item.memory.total, cluster) for item in found):
        lines.append(
            f"tight: over {TIGHT:.0%} of the memory; published runs that full were mostly slower than predicted"
        )
    return "\n".join(lines)


def _explain(item: Candidate, shape: Shape, cluster: Cluster, say: Any) -> None:
    strategy, time_ = item.strategy, item.time
    say(f"{strategy.describe()}, {strategy.micro_batches} micro batches of {strategy.micro_batch} x {strategy.seq}")
    say(f"step {time_.total:.3f} s, {item.tokens_per_s():,.0f} tokens/s/GPU")
    say(f"MFU {item.mfu(shape, cluster, False):.1%} (full attention), {item.mfu(shape, cluster, True):.1%} (causal)")
    say("| time | s | share |\n| --- | --- | --- |")
    for name, value in time_.parts().items():
        say(f"| {name} | {value:.4f} | {value / time_.total:.1%} |")
    if strategy.pp > 1 and cluster.host is None:
        few = min(strategy.micro_batches, 4 * strategy.pp) // strategy.pp * strategy.pp or strategy.micro_batches
        simulated = Model(shape, strategy, cluster).timeline(few)
        say(f"bubble of {few} micro batches, simulated event by event: {simulated.bubble:.1%}")
    say(f"\nfullest GPU: stage {item.memory.stage}\n| memory | GiB |\n| --- | --- |")
    for name, value in item.memory.by_kind().items():
        say(f"| {name} | {value / GIB:.2f} |")
    room = cluster.chip.memory_bytes / GIB
    verdict = "fits" if fits(item.memory, cluster) else "does not fit"
    say(
        f"{item.memory.total / GIB:.1f} GiB of tensors; with {CONTEXT_BYTES / GIB:.0f} GiB of context and 4 % for the "
        f"allocator it {verdict} into {room:.1f} GiB"
    )


def _say_run(request: Question, best: Candidate, cluster: Cluster) -> None:
    if request.tokens is None:
        return
    seconds = request.tokens / (best.tokens_per_s() * request.gpus)
    price = request.price_per_gpu_hour or cluster.price_per_gpu_hour
    show(f"{request.tokens:.3g} tokens without a failure: {_bill(seconds, request.gpus, price)}")
    profile = find_profile("llama3")
    job = Job(request.gpus, profile.rate_per_gpu_month, profile.hardware_share, gpus_per_node=cluster.gpus_per_node)
    job = replace(job, interval_s=best_interval_s(1.0 / job.failures_per_s, job.write_s))
    share = goodput(job)
    show(
        f"with Llama 3's failure rate, {job.detect_s:.0f} s to notice, {job.restart_s:.0f} s to restart and a "
        f"checkpoint of {job.write_s:.0f} s every {job.interval_s / 60:.0f} min, goodput is {share:.1%}: "
        f"{_bill(seconds / share, request.gpus, price)} (llm-parallel goodput for other rates)"
    )


def _bill(seconds: float, gpus: int, price: float | None) -> str:
    hours = seconds / HOUR_S * gpus
    cost = f", {hours * price:,.0f} at {price:g} per GPU-hour" if price else ""
    return f"{seconds / HOUR_S / 24:.1f} days, {hours:,.0f} GPU-hours{cost}"


def _run_tree(request: Question, shape: Shape, strategy: Strategy, cluster: Cluster, whole: bool) -> dict[str, Any]:
    """Sections of a run file; ``whole`` replaces the preset by its fields, for the rules to check."""
    fields = as_run_fields(shape, strategy)
    fields["train"]["steps"] = max(1, round((request.tokens or 1e12) / (request.global_batch * request.seq)))
    model = planned(request.model)
    section = dict(model.fields if whole else model.section)
    if model.longest is not None and request.seq > model.longest:
        section["max_seq_length_tokens"] = request.seq
    return {
        "run_dir": f"runs/{model.name}-{cluster.name}x{request.gpus}",
        "model": section,
        "data": {"seq_length_tokens": request.seq},
        **fields,
    }


def write_run_file(request: Question, shape: Shape, best: Candidate, cluster: Cluster) -> None:
    """Writes a run file that ``pretrain`` takes once its data is filled in. Raises UserError if our trainer can't run
    it."""
    if best.strategy.zero > 1 or best.strategy.recompute == "ops":
        raise UserError(
            f"--write: this layout was predicted for {SOFTWARE_NAMES[request.software]}; our trainer has no sharded "
            "gradients and weights (ZeRO-2, ZeRO-3) and does not recompute single operators; plan with --software ours"
        )
    config = RunConfig.model_validate(_run_tree(request, shape, best.strategy, cluster, whole=True))
    problems = find_problems(config, request.gpus, "cuda")
    if problems:
        raise UserError(f"--write: our trainer refuses this layout: {problems[0].message}")
    tree = _run_tree(request, shape, best.strategy, cluster, whole=False)
    header = (
        f"# {_as_command(request)}\n# predicted: {best.time.total:.3f} s a step, "
        f"{best.tokens_per_s():,.0f} tokens/s/GPU, {best.memory.total / GIB:.1f} GiB\n"
    )
    path = Path(request.write or "run.yaml")
    write_schema(path.parent)
    with atomic_write(path) as handle:
        handle.write(SCHEMA_LINE + header + yaml.safe_dump(tree, sort_keys=False))
    show(f"written: {request.write}; add data.train and data.tokenizer, or give them as overrides")


def as_data(item: Candidate, shape: Shape, cluster: Cluster) -> dict[str, Any]:
    """A candidate as JSON values."""
    s = item.strategy
    return {
        "layout": {"tp": s.tp, "pp": s.pp, "dp": s.dp, "cp": s.cp, "vpp": s.vpp, "micro_batch": s.micro_batch,
                   "recompute": s.recompute, "precision": s.precision},
        "step_s": item.time.total,
        "tokens_per_s_per_gpu": item.tokens_per_s(),
        "mfu_full": item.mfu(shape, cluster, False),
        "mfu_causal": item.mfu(shape, cluster, True),
        "time_s": item.time.parts(),
        "memory_bytes": item.memory.by_kind(),
    }  # fmt: skip
