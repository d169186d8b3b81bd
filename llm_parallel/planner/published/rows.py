"""Reads published training throughput: brings it to one convention, fills blanks, and refuses rows that can't be
predicted."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.planner.published.sources import CONVENTIONS, Source, source_named
from llm_parallel.planner.shapes import Shape, Strategy

DATA = resources.files("llm_parallel.planner.published") / "data"
COLUMNS = (
    "source", "model", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gpus", "chip", "precision",
    "tp", "pp", "vpp", "cp", "dp_or_ep", "micro_batch", "global_batch", "recompute", "tflops_per_gpu",
    "tokens_per_s_per_gpu", "step_time_s", "mfu_pct", "note",
)  # fmt: skip
_MORE = ("n_params_b", "mfu_convention")
"""Columns that a file need not have."""
MOST_LAYERS = 10_000
DEFAULT_VOCAB = 51200
"""GPT-2's vocabulary padded for TP 8, which papers that state no figure use."""


_SAID = (
    (r"HFU|with[ _-]recompute", "hardware"),
    (r"non-causal|full attention", "full"),
    (r"causal", "causal"),
    (r"\b6 ?N\b", "six_n"),
)
"""Patterns in a row's note, and the convention that they mean where mfu_convention is blank."""
_GATED = re.compile(r"llama|mistral|qwen|smollm|olmo|gemma|phi|yi-|baichuan|internlm|granite", re.IGNORECASE)
"""Names of families with a gated feed-forward part, which decide where the dimensions do not."""
_MOE = re.compile(r"MoE|8x|_a3B|A3B|OSS|DeepSeek|Mixtral|ep=", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One measurement that can be predicted."""

    number: int
    """Line of the CSV; the header is line 1."""
    source: str
    """Short name of who published it."""
    model: str
    """Name of the model, as published."""
    chip: str
    """A100, H100 or H200."""
    cluster: str
    """Description of the cluster, as ``dgx-a100``."""
    shape: Shape
    """The model's dimensions."""
    strategy: Strategy
    """How it was trained."""
    unknown: tuple[str, ...]
    """Fields of ``strategy`` that the row leaves blank and the software does not decide; see ``fit.predict``."""
    tokens_per_s: float
    """Tokens per second and GPU."""
    memory_gib: float | None
    """Printed peak memory of a GPU; None if none was printed."""
    memory_of: str = "not stated"
    """What the printed memory counts, as in ``Source``."""
    memory_of_first: bool = False
    """Whether it is the first stage's rather than the fullest one's."""
    software: str = "not stated"
    """What the model was trained with."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.strategy.global_batch * self.strategy.seq / (self.tokens_per_s * self.strategy.gpus)


@dataclass(frozen=True)
class Refused:
    """A row that can't be predicted, and why."""

    number: int
    source: str
    reason: str


def read_rows(path: str | None = None) -> tuple[list[Row], list[Refused]]:
    """Rows of a CSV with the columns of the package's own, or of the package's own if ``path`` is None. Fields may be
    blank. The optional column ``mfu_convention`` (or else the note) says which FLOPs TFLOP/s and MFU count; this
    matters where a row has neither step time nor tokens/s.

    Raises UserError if the file can't be read, lacks a column or a row, names an unknown convention, or if rows of one
    source on one chip count by different ones."""
    if path is None:
        text = (DATA / "published_throughput.csv").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--rows {path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text))
    if not reader.fieldnames:
        raise UserError(f"--rows {path} is empty; it needs a line of columns and a row for each measured run")
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"--rows {path or ''} has no column {missing[0]}; it needs {', '.join(COLUMNS)}")
    records = [{name: (record.get(name) or "").strip() for name in (*COLUMNS, *_MORE)} for record in reader]
    if not records:
        raise UserError(f"--rows {path} is empty; give a row for each measured run below the columns' names")
    _check_conventions(records, f"--rows {path or ''}".strip())
    rows, refused = [], []
    for number, record in enumerate(records, start=2):
        try:
            rows.append(_row(number, record))
        except _CannotSay as why:
            refused.append(Refused(number, short(record["source"]), str(why)))
    return rows, refused


def _check_conventions(records: Sequence[Mapping[str, str]], where: str) -> None:
    """Raises UserError where rows whose speed follows from TFLOP/s or MFU name an unknown convention, or two of one
    source on one chip differ."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for number, record in enumerate(records, start=2):
        text = record["mfu_convention"]
        if text and text not in CONVENTIONS:
            raise UserError(f"{where}: row {number}: mfu_convention {text!r} is not one of {', '.join(CONVENTIONS)}")
        if record["step_time_s"] or record["tokens_per_s_per_gpu"]:
            continue
        if not record["tflops_per_gpu"] and not record["mfu_pct"]:
            continue
        known = source_named(record["source"], f"{record['model']} {record['note']}")
        convention = _convention(record, known)
        before, other = first.setdefault((record["source"], record["chip"]), (number, convention))
        if other != convention:
            raise UserError(
                f"{where}: rows {before} and {number}, both of {short(record['source'])} on {record['chip']}, count "
                f"MFU as {other} and as {convention}; give both in one convention, or tokens_per_s_per_gpu instead"
            )


def _convention(record: Mapping[str, str], known: Source) -> str:
    """Which FLOPs a row's TFLOP/s and MFU count, by its column, its note, or what is known of its source."""
    said = (found for pattern, found in _SAID if re.search(pattern, record["note"], re.IGNORECASE))
    return record["mfu_convention"] or next(said, known.convention)


def short(source: str) -> str:
    """A source's name without commits and addresses."""
    text = re.sub(r"\(arXiv.*|@\S+|\[|\]|\(.*", " ", source)
    return re.sub(r"\s+", " ", text).strip(" ;,.")[:60]


class _CannotSay(Exception):
    pass


def _number(record: Mapping[str, str], name: str) -> int:
    text = record[name]
    if not text:
        raise _CannotSay(f"{name} is not stated")
    found = _positive(record, name)
    if found != int(found):
        raise _CannotSay(f"{name} is {text!r}, no whole number")
    return int(found)


def _positive(record: Mapping[str, str], name: str) -> float:
    try:
        found = float(record[name])
    except ValueError:
        raise _CannotSay(f"{name} is {record[name]!r}, no number") from None
    if not 0 < found < 1e18:
        raise _CannotSay(f"{name} is {record[name]}, which must be over 0")
    return found


def _optional(record: Mapping[str, str], name: str, default: int) -> int:
    return _number(record, name) if record[name] else default


def _row(number: int, record: Mapping[str, str]) -> Row:
    source, note = record["source"], record["note"]
    if _MOE.search(record["model"] + " " + record["dp_or_ep"]):
        raise _CannotSay("mixture of experts")
    if re.search(r"LoRA|SFT|fine-tun", record["model"] + note):
        raise _CannotSay("fine-tuning, whose packing is not stated")
    if "MegaScale)" in record["model"]:
        raise _CannotSay("parallel block and sliding-window attention")
    if "ZeRO-3" in record["model"]:
        raise _CannotSay("DeepSpeed's ZeRO-3 without overlap")
    known = source_named(source, f"{record['model']} {note}")
    chip, cluster = _chip(record["chip"])
    shape = _shape(record, known)
    strategy = _strategy(record, known, note)
    tokens = _tokens_per_s(record, known, shape, strategy)
    found = re.search(r"mem_gi?b=(\d+(?:\.\d+)?)", note)
    # nanotron's "GB" are GiB too: helpers.py divides by 1024**3.
    unit = 1.0 if found and ("mem_gib" in found.group(0) or "nanotron" in source) else 1e9 / 2**30
    return Row(
        number, short(source), record["model"], chip, cluster, shape, strategy,
        _unknown(record, known, strategy),
        tokens, float(found.group(1)) * unit if found else None, known.memory_of,
        known.memory_of_first, known.software,
    )  # fmt: skip


def _chip(text: str) -> tuple[str, str]:
    if re.search(r"PCI|NVL", text, re.IGNORECASE):
        raise _CannotSay(f"chip {text} is another than the SXM one: less power, no NVLink to all of its node")
    if "H200" in text:
        return "H200", "dgx-h200"
    if "500W" in text or "low-TDP" in text:
        return "H100", "dgx-h100-500w"
    if "H100" in text:
        return "H100", "dgx-h100"
    if "A100" in text:
        return "A100", "dgx-a100-40" if "40GB" in text else "dgx-a100"
    raise _CannotSay(f"chip {text or 'not stated'} is none of A100, H100 and H200")


def _shape(record: Mapping[str, str], known: Source) -> Shape:
    hidden, heads = _number(record, "hidden"), _number(record, "heads")
    if heads > hidden or _number(record, "layers") > MOST_LAYERS:
        raise _CannotSay(f"{record['layers']} layers of {hidden} with {heads} heads are no model")
    named = bool(_GATED.search(record["model"]))
    gated = not known.gpt and (named or (bool(record["ffn"]) and _number(record, "ffn") != 4 * hidden))
    found = Shape(
        layers=_number(record, "layers"),
        hidden=hidden,
        heads=heads,
        groups=_optional(record, "kv_heads", heads),
        ffn=_optional(record, "ffn", 4 * hidden),
        vocab=_optional(record, "vocab", DEFAULT_VOCAB),
        gated=gated,
        tied=not gated,
        dropout=known.gpt and not known.flash,
        rotary=not known.gpt,
    )
    # The row of a proxy model prints the number of parameters of the whole model.
    if not record["n_params_b"] or "PROXY" in record["model"]:
        return replace(found, dropout=not gated and not known.flash, rotary=gated)
    return _counted(record, known, found)


def _counted(record: Mapping[str, str], known: Source, named: Shape) -> Shape:
    """The shape whose number of parameters is the printed one: with or without a gate, with tied embeddings or not, and
    with as many heads of keys and values as that takes where the row does not state them. The name decides between
    shapes that are equally near. Raises _CannotSay if none is near."""
    printed = _positive(record, "n_params_b")
    rounding = 0.5 * 10.0 ** -len(record["n_params_b"].partition(".")[2])
    groups = [named.groups] if record["kv_heads"] else [n for n in range(named.heads, 0, -1) if named.heads % n == 0]
    gates = [False] if known.gpt else [named.gated, not named.gated]
    shapes = [
        replace(named, gated=gated, tied=tied, groups=count, dropout=not gated and not known.flash, rotary=gated)
        for count in groups
        for gated in gates
        for tied in (named.tied, not named.tied)
    ]

    def apart(shape: Shape) -> float:
        # Learned positions, which printed numbers of parameters count.
        positions = 0 if shape.gated else shape.hidden * _number(record, "seq")
        return abs((shape.parameters + positions) / 1e9 - printed)

    nearest = min(shapes, key=apart)
    close = [shape for shape in shapes if apart(shape) <= max(apart(nearest), 0.02 * printed)]
    if record["kv_heads"] and named in close:
        nearest = next(shape for shape in close if (shape.gated, shape.tied) == (named.gated, named.tied))
    if apart(nearest) > 0.05 * printed + rounding:
        raise _CannotSay(
            f"n_params_b is {record['n_params_b']}, and {named.layers} layers of {named.hidden} with ffn {named.ffn} "
            f"and a vocabulary of {named.vocab} have {nearest.parameters / 1e9:.3g}"
        )
    return nearest


def _strategy(record: Mapping[str, str], known: Source, note: str) -> Strategy:
    gpus, seq = _number(record, "gpus"), _number(record, "seq")
    tp, pp, cp = _number(record, "tp"), _number(record, "pp"), _optional(record, "cp", 1)
    if gpus % (tp * pp * cp):
        raise _CannotSay(f"{gpus} GPUs are no multiple of TP {tp} x PP {pp} x CP {cp}")
    if _number(record, "heads") % tp:
        raise _CannotSay(f"{record['heads']} heads do not divide by TP {tp}")
    replicas = gpus // (tp * pp * cp)
    local = _local_batch(note)
    micro = _optional(record, "micro_batch", local // pp if local else 1)
    batch = _optional(record, "global_batch", (local or micro) * replicas)
    if batch < replicas:
        raise _CannotSay(f"global_batch {batch} is smaller than {replicas} replicas")
    recompute = record["recompute"] or known.recompute
    layers = _number(record, "layers")
    vpp = _optional(record, "vpp", 2 if "Interleaved" in note else 1)
    if layers < pp or pp * vpp - layers > 2:  # some leave one or two chunks with the embedding or the output alone
        raise _CannotSay(f"{layers} layers on PP {pp} x VPP {vpp}")
    precision = "fp8" if "fp8" in record["precision"].lower() else "bf16"
    if precision == "fp8" and "A100" in record["chip"]:
        raise _CannotSay("precision is fp8, and an A100 has no 8-bit floating-point products")
    stated = re.search(r"ZeRO-([01])", note)
    zero = int(stated.group(1)) if stated else known.zero
    zero = 3 if re.search(r"\bFSDP=", note) else zero
    asynchronous = "async tp" in note.lower() or "asynctp" in note.lower()
    sequence = known.sequence_parallel or "sequence_parallel" in recompute
    return Strategy(
        gpus=gpus, global_batch=batch, micro_batch=micro, seq=seq, tp=tp, pp=pp, cp=cp, vpp=vpp,
        recompute=_recompute(recompute, record["source"]),  # type: ignore[arg-type]
        sequence_parallel=sequence and tp > 1, zero=zero, precision=precision, flash=known.flash,  # type: ignore[arg-type]
        overlap_tp=known.overlap_tp or asynchronous, overlap_pp=known.overlap_pp,
        overlap_dp=known.overlap_dp and tp >= known.overlap_dp_from_tp,
        grad_bytes=known.grad_bytes, adds_gradients=known.adds_gradients, te=known.te, cp_gathers=not known.te,
        flash_rate=known.flash_rate, keeps_gathered=known.keeps_gathered,
        prefetches=known.prefetches, early_stop=known.early_stop, logit_bytes=_logit_bytes(known, tp),
        copied_grad_bytes=known.copied_grad_bytes, keeps_gate=known.keeps_gate,
        stage_layers=_stage_layers(record, pp, vpp), dp_collectives=known.tensors_of_layer * -(-layers // pp),
        fused="torchtitan" not in record["source"] or "compile" in note,
    )  # fmt: skip


def _local_batch(note: str) -> int:
    """Samples of a rank in a step, where the note says them. torchtitan's pipelines split them into as many micro
    batches as there are stages (pipelining_utils.py at 9dec370)."""
    found = re.search(r"local batch (\d+)", note)
    return int(found.group(1)) if found else 0


def _unknown(record: Mapping[str, str], known: Source, strategy: Strategy) -> tuple[str, ...]:
    """Fields of the strategy that a row leaves open."""
    found = []
    if not record["micro_batch"] and not _local_batch(record["note"]):
        found.append("micro_batch")
    if not record["vpp"] and known.interleaves and strategy.pp > 1 and "Interleaved" not in record["note"]:
        found.append("vpp")
    decided = {"recompute": bool(record["recompute"]), "sequence_parallel": strategy.tp == 1}
    decided["overlap_tp"] = strategy.tp == 1 or strategy.overlap_tp
    return (*found, *(name for name in known.unknown if not decided[name]))


def _logit_bytes(known: Source, tp: int) -> int:
    """Bytes of a logit at the loss. torchtitan's loss under tensor parallelism is DTensor's, which keeps four fp32
    tensors of this size: log-softmax, zeros, exponentials and their sum."""
    return 16 if known.zero == 3 and known.logit_bytes == 12 and tp > 1 else known.logit_bytes


def _stage_layers(record: Mapping[str, str], pp: int, vpp: int) -> tuple[int, ...] | None:
    """Layers of each model chunk where a source's software does not spread them evenly."""
    layers = _number(record, "layers")
    if pp == 1:
        return None
    if "torchtitan" in record["source"]:  # generate_split_points: only middle stages get one more
        least, rest = divmod(layers, pp * vpp)
        chunks = [least + (0 < number <= rest) for number in range(pp * vpp)]
        return (*chunks[:-1], layers - sum(chunks[:-1]))
    if "nanotron" in record["source"]:  # build_model: a stage ends with the block that exceeds its share of products
        hidden, ffn = _number(record, "hidden"), _number(record, "ffn")
        layer = 4 * hidden**2 + 3 * hidden * ffn
        whole = layers * layer + hidden * _number(record, "vocab")
        ends = [min(layers, int(whole * (stage + 1) / pp / layer) + 1) for stage in range(pp - 1)] + [layers]
        return tuple(end - begin for begin, end in zip([0, *ends], ends))
    return None


def _recompute(text: str, source: str) -> str:
    if text.startswith("full") or text == "qkv":
        return text[:4]
    if "selective" not in text:
        return "none"
    return "ops" if "torchtitan" in source else "selective"


def _tokens_per_s(record: Mapping[str, Any], known: Source, shape: Shape, strategy: Strategy) -> float:
    """Tokens per second and GPU: from the step time if it is given, else from tokens/s, else from TFLOP/s or MFU by the
    source's convention. Raises _CannotSay for figures that no chip reaches or that contradict each other."""
    peak = 312e12 if "A100" in record["chip"] else 989.4e12 * (2 if strategy.precision == "fp8" else 1)
    flops = {
        "full": shape.flops_per_token(strategy.seq),
        "causal": shape.flops_per_token(strategy.seq, causal=True),
        # Recomputation adds another forward, a third of the layers' FLOPs.
        "hardware": shape.flops_per_token(strategy.seq)
        + (shape.flops_per_token(strategy.seq) - 6.0 * shape.vocab * shape.hidden) / 3.0,
        "six_n": 6.0 * shape.parameters,
    }[_convention(record, known)]
    found: dict[str, float] = {}
    if record["step_time_s"]:
        found["step_time_s"] = strategy.global_batch * strategy.seq / _positive(record, "step_time_s") / strategy.gpus
    if record["tokens_per_s_per_gpu"]:
        found["tokens_per_s_per_gpu"] = _positive(record, "tokens_per_s_per_gpu")
    if record["tflops_per_gpu"]:
        found["tflops_per_gpu"] = 1e12 * _positive(record, "tflops_per_gpu") / flops
    if record["mfu_pct"]:
        percent = _positive(record, "mfu_pct")
        if percent <= 1:
            raise _CannotSay(f"mfu_pct is {record['mfu_pct']}, a share; give percent, as {100 * percent:g}")
        found["mfu_pct"] = percent / 100 * peak / flops
    if not found:
        raise _CannotSay("no figure of throughput")
    # Causal attention is the least that a token can cost, and six_n counts no attention at all.
    least = min(flops, shape.flops_per_token(strategy.seq, causal=True))
    for name, tokens in found.items():
        if tokens * least > peak:
            raise _CannotSay(
                f"{name} is {record[name]}, which is {tokens * least / peak:.3g} times the chip's peak; its unit is "
                f"{_UNITS[name]}"
            )
    _agree(record, found)
    return next(iter(found.values()))


_UNITS = {
    "step_time_s": "seconds",
    "tokens_per_s_per_gpu": "tokens/s of one GPU, not of all",
    "tflops_per_gpu": "TFLOP/s of one GPU",
    "mfu_pct": "percent",
}
APART = 1.6
"""Ratio of two figures of one row from which on they contradict each other. Conventions of FLOPs that a row does not
state, and means over other steps, explain less."""


def _agree(record: Mapping[str, str], found: Mapping[str, float]) -> None:
    """Raises _CannotSay where two figures of throughput are of different runs or units."""
    low, high = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
    if found[high] > APART * found[low]:
        raise _CannotSay(
            f"{low} {record[low]} and {high} {record[high]} contradict each other: {found[low]:,.0f} and "
            f"{found[high]:,.0f} tokens/s of a GPU"
        )
