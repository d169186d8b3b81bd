"""summary.md: what the stages found, as Markdown, from plain data alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.plan import STAGES

Record = Mapping[str, Any]


def summary(found: Mapping[str, Record]) -> str:
    """found: stage → its record, of those that have one."""
    results = {name: record.get("result") or {} for name, record in found.items()}
    env = results.get("environment", {})
    lines = [f"# {env.get('chip', 'unknown chip')}, {env.get('date', 'no date')}", ""]
    lines += ["| stage | state | seconds | |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys([*(stage.name for stage in STAGES), *found]):
        record = found.get(name, {})
        left = (record.get("result") or {}).get("left_out")
        said = record.get("problem") or (f"no time for: {', '.join(left)}" if left else "")
        seconds = f"{record['seconds']:.0f}" if "seconds" in record else ""
        lines.append(f"| {name} | {record.get('state', 'did not run')} | {seconds} | {_cell(said)} |")
    for name, section in _SECTIONS.items():
        if results.get(name):
            lines += ["", f"## {name}", "", *section(results[name])]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "/")[:400]


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _number(value: Any, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _environment(result: Record) -> list[str]:
    lines = ["```", json.dumps(result, indent=1), "```"]
    card = result.get("card")
    if card:
        lines += ["", f"Measured on this card: copy {card['copy_bytes_per_s'] / 1e9:.0f} GB/s, bf16 product "
                  f"{card['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s."]  # fmt: skip
    return lines


def _correctness(result: Record) -> list[str]:
    heads = ("operator", "size", "", "worst error, relative", "torch's own", "seconds")
    return table(heads, [
        (row["operator"], row["shape"], f"WRONG: {row['problem']}" if row["problem"] else "right",
         _number(row["worst_error"], ".2e"), _number(row["framework_error"], ".2e"), f"{row['seconds']:.1f}")
        for row in result.get("rows", [])
    ])  # fmt: skip


def _operators(result: Record) -> list[str]:
    heads = ("operator", "shape", "mode", "provider", "ms (p20 to p80)", "rate", "of peak", "peak MiB", "host µs")
    rows = []
    for row in result.get("rows", []):
        about = (row["operator"], row["shape"], row["mode"], row["provider"])
        if row.get("median_ms") is None:
            rows.append((*about, row["note"], "", "", "", ""))
            continue
        bandwidth = row.get("gb_per_s")
        rate = f"{bandwidth:.0f} GB/s" if bandwidth is not None else f"{row['tflop_per_s']:.0f} TFLOP/s"
        times = f"{row['median_ms']:.4f} ({row['p20_ms']:.4f} to {row['p80_ms']:.4f})"
        host = _number(row.get("host_us"), ".0f")
        rows.append((*about, times, rate, f"{row['fraction']:.0%}", f"{row['peak_mib']:.0f}", host))
    proof = [f"The Gluon attention on this machine: {result['proof']}.", ""] if "proof" in result else []
    return proof + (table(heads, rows) if rows else []) + (["", *_steps(result)] if result.get("steps") else [])


def _steps(result: Record) -> list[str]:
    heads = ("model", "contender", "ms a step (least to most)", "tokens/s", "MFU", "peak GiB", "first losses", "")
    rows = []
    for row in result.get("steps", []):
        about = (row["model"], row["contender"])
        if "median_ms" not in row:
            rows.append((*about, "", "", "", "", "", row.get("note", "")))
            continue
        times = f"{row['median_ms']:.1f} ({row['min_ms']:.1f} to {row['max_ms']:.1f})"
        losses = ", ".join(f"{loss:.4f}" for loss in row["first_losses"])
        rows.append((*about, times, f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}",
                     losses, ""))  # fmt: skip
    return [*table(heads, rows), "", result.get("convention", "")]


def _pretrain(result: Record) -> list[str]:
    rows = [
        (row["run"], ", ".join(f"{loss:.4f}" for loss in row["losses"]), row.get("problem", ""))
        for row in result.get("rows", [])
    ]
    worst = result.get("worst_difference")
    said = f"{result.get('verdict', '')}; largest relative difference {_number(worst, '.1e') or 'none'}, "
    return [*table(("run", "losses", ""), rows), "", f"{said}allowed {result.get('tolerance')}"]


def _generation(result: Record) -> list[str]:
    rows = [
        (row["run"], str(row["requests"]), str(row["tokens"]), f"{row['seconds']:.2f}", f"{row['tokens_per_s']:,.0f}")
        for row in result.get("rows", [])
    ]
    worst = _number(result.get("worst_difference"), ".1e") or "none"
    said = f"largest difference of log-probabilities in fp32: {worst} over {result.get('compared', 0)} tokens"
    return [*table(("run", "requests", "new tokens", "s, with prompts", "new tokens/s"), rows), "", said]


def _tests(result: Record) -> list[str]:
    counts = ", ".join(f"{count} {name}" for name, count in result.get("counts", {}).items())
    return [counts or "none ran", *(f"- {one['test']}: {one['error']}" for one in result.get("failures", []))]


def _counters(result: Record) -> list[str]:
    kernels = result.get("kernels", [])
    heads = list(dict.fromkeys(name for kernel in kernels for name in kernel))
    lines = [
        f"{result.get('operator', '')} {result.get('shape', '')}: {result.get('problem') or result.get('note', '')}"
    ]
    return lines + (
        ["", *table(heads, [[kernel.get(head, "") for head in heads] for kernel in kernels])] if kernels else []
    )


def _tuning(result: Record) -> list[str]:
    own = {row["table"]: row.get("median_ms") for row in result.get("rows", []) if row.get("own")}
    rows = []
    for row in result.get("rows", []):
        base, ms = own.get(row["table"]), row.get("median_ms")
        ratio = f"{base / ms:.3f}" if base and ms else ""
        rows.append((row["table"], row.get("shape", ""), row["choice"], _number(ms), ratio, row.get("note", "")))
    return table(("table", "shape", "choice (the table's own first)", "ms", "speed over the table's", ""), rows)


_SECTIONS: dict[str, Callable[[Record], list[str]]] = {
    "environment": _environment, "correctness": _correctness, "operators": _operators, "step": _steps,
    "pretrain": _pretrain, "generation": _generation, "tests": _tests,
    "counters": _counters, "gluon": _operators, "compiled": _operators,
    "tuning": _tuning,
}  # fmt: skip
