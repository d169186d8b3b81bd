"""The console's line of a step, fitted to the terminal: the most important numbers are kept, and none is cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from llm_parallel.metrics.record import EvalRecord, StepRecord, TaskRecord

_SEPARATOR = " | "
_IMPORTANCE = ("step", "skipped", "loss", "eta", "tokens", "grad", "lr", "mfu", "statistics", "memory", "tflops")
"""Kinds of fields, what is left out last first."""
_CONSTANT = ("lr", "memory")
"""Kinds that are left out where they are as in the line before; they stand last, so that nothing moves."""

_LEFT_OUT = (
    "num_tokens", "reward_", "frac_reward", "completions/", "sampling/", "held_out/", "kl_to_reference", "kept"
)  # fmt: skip
"""Beginnings of names of statistics that only grow, or are about the answers of a round, which has a line of its own;
metrics.jsonl has them."""
_SHORTER = {"mean_token_accuracy": "accuracy"}
"""Names of statistics in the line, where they are other ones."""


@dataclass(frozen=True)
class Field:
    """One number of a line with the text around it."""

    kind: str
    """What it counts as in ``_IMPORTANCE``."""
    value: str
    """The number."""
    before: str = ""
    """Text before the number."""
    after: str = ""
    """Text after the number."""

    def text(self, width: int = 0) -> str:
        """The field, its number right-aligned in ``width`` characters."""
        return f"{self.before}{self.value:>{width}}{self.after}"


class StepLines:
    """Lines of the steps of one run. ``unit``, "GPU" or "process", is what rates are given per."""

    def __init__(self, total_steps: int, unit: str) -> None:
        self._total_steps, self._unit = total_steps, unit
        self._widths: dict[str, int] = {}
        self._last: dict[str, str] = {}

    def line(self, record: StepRecord, width: int | None = None) -> str:
        """The line of a step. With a ``width`` it has at most that many characters, short forms of words where the long
        ones do not fit, and its numbers below those of earlier lines; without, it has all that is known.

        What is not known (MFU without a peak) and what is as in the line before is left out."""
        found = fields(record, self._total_steps, self._unit)
        known = {kind for kind in _CONSTANT if Field(kind, self._last.get(kind, "")) in map(_bare, found)}
        self._last = {field.kind: field.value for field in found}
        if width is None:
            reason = [f"SKIPPED: {record.skip_reason}"] if record.skipped else []
            shown = [field.text() for field in found if field.kind not in {"skipped", *known}]
            return _SEPARATOR.join([*shown, *reason])
        return fitted([(field.kind, self._aligned(field)) for field in found], width, hidden=known)

    def _aligned(self, field: Field) -> str:
        name = field.before + field.after
        self._widths[name] = max(self._widths.get(name, 0), len(field.value))
        return field.text(self._widths[name])


def _bare(field: Field) -> Field:
    return Field(field.kind, field.value)


def fields(record: StepRecord, total_steps: int, unit: str) -> list[Field]:
    """Everything that is known of a step, in the order of the line."""
    found = [Field("step", f"{record.step:>{len(str(total_steps))}}/{total_steps}", "step ")]
    if record.skipped:
        found.append(Field("skipped", "SKIPPED"))
    found.append(Field("loss", f"{record.loss:.4f}", "loss "))
    shown = {name: value for name, value in record.statistics.items() if not name.startswith(_LEFT_OUT)}
    found += [Field("statistics", f"{value:.4g}", f"{_SHORTER.get(name, name)} ") for name, value in shown.items()]
    found += [
        Field("grad", f"{record.grad_norm:.3f}", "grad norm "),
        Field("tokens", f"{record.tokens_per_s_per_gpu:,.0f}", after=f" tokens/s/{unit}"),
        Field("tflops", _significant(record.tflops_per_gpu), after=f" TFLOP/s/{unit}"),
    ]
    if record.mfu is not None:
        found.append(Field("mfu", f"{record.mfu:.1%}", "MFU "))
    return [
        *found,
        Field("eta", duration(record.eta_s), "ETA "),
        Field("lr", f"{record.lr:.2e}", "lr "),
        Field("memory", f"{record.memory_reserved_gib:.2f}", after=" GiB"),
    ]


def fitted(
    parts: Sequence[tuple[str, str]],
    width: int,
    importance: Sequence[str] = _IMPORTANCE,
    hidden: Collection[str] = (),
) -> str:
    """Texts by kind, joined: all of them if they fit into ``width`` characters; else in their short forms, and of those
    as many as fit, by importance. The most important one is always there, whole. Those that are ``hidden`` keep their
    place, so that no other text takes it for a single line."""
    if len(_SEPARATOR.join(text for _, text in parts)) > width:
        parts = [(kind, _shortened(text)) for kind, text in parts]
    ordered = sorted(range(len(parts)), key=lambda at: importance.index(parts[at][0]))
    chosen: set[int] = {ordered[0]}
    used = len(parts[ordered[0]][1])
    for at in ordered[1:]:
        needed = len(_SEPARATOR) + len(parts[at][1])
        if used + needed <= width:
            chosen.add(at)
            used += needed
    return _SEPARATOR.join(parts[at][1] for at in sorted(chosen) if parts[at][0] not in hidden)


_SHORT: Mapping[str, str] = {
    "grad norm ": "grad ",
    " tokens/s/process": " tok/s/proc",
    " tokens/s/": " tok/s/",
    " TFLOP/s/process": " TFLOP/s",
    " TFLOP/s/GPU": " TFLOP/s",
    "evaluation after step ": "eval at ",
    "perplexity ": "ppl ",
}


def _shortened(text: str) -> str:
    for long, short in _SHORT.items():
        text = text.replace(long, short)
    return text


def eval_line(record: EvalRecord, width: int | None = None) -> str:
    """The line of an evaluation; with a ``width`` at most that many characters."""
    parts = [
        ("step", f"evaluation after step {record.step}"),
        ("loss", f"loss {record.loss:.4f}"),
        *([] if record.perplexity is None else [("perplexity", f"perplexity {record.perplexity:.4g}")]),
        *(
            []
            if record.unit == "token"
            else [(name, f"{name} {value:.4g}") for name, value in record.statistics.items()]
        ),
        ("units", f"{record.samples:,} samples, {record.units:,} {record.unit}s"),
    ]
    if width is None:
        return _SEPARATOR.join(text for _, text in parts)
    return fitted(parts, width, ("loss", "step", *(name for name, _ in parts[2:])))


def task_line(record: TaskRecord) -> str:
    """The line of tasks' scores, shares in percent with their standard errors."""
    parts, before = [], ""
    for one in record.scores:
        named = one.metric if one.task == before else f"{one.task} {one.metric}"
        error = "" if one.error is None else f" ± {score_text(one.error)}"
        parts.append(f"{named} {score_text(one.value)}{error}")
        before = one.task
    return _SEPARATOR.join([f"tasks after step {record.step}", *parts, f"{record.seconds:.1f} s"])


def score_text(value: float) -> str:
    """A score: a share, which is between 0 and 1, in percent, another number with four digits."""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """``1:02:03``, with days before it where there are any."""
    return str(timedelta(seconds=round(seconds)))


def _significant(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
