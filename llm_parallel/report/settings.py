"""A run's configuration and mixture as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_parallel.config.fields import describe_fields
from llm_parallel.config.load import load_config
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.errors import UserError
from llm_parallel.report.runs import Run
from llm_parallel.train.preflight import mixture

Row = tuple[str, ...]
OWN_PLACE = ("run_dir", "data.train", "data.eval", "chat.train", "chat.eval")
"""Fields that every run gives, or that the table of sources shows."""


def settings(run: Run) -> tuple[list[Row], list[Row]]:
    """Fields that differ from their defaults with both values, and all fields with their values.

    The defaults of a model's shape are those of its preset, if it has one."""
    defaults: dict[str, Any] = {field.name: field.default for field in describe_fields() if not field.is_section}
    preset = MODEL_PRESETS.get(str(run.config.get("model.preset")), {})
    defaults |= {f"model.{name}": value for name, value in preset.items()}
    differing: list[Row] = [
        (name, _text(value), "—" if defaults.get(name, ...) is ... else _text(defaults[name]))
        for name, value in run.config.items()
        if name not in OWN_PLACE and _plain(value) != _plain(defaults.get(name))
    ]
    return differing, [(name, _text(value)) for name, value in run.config.items()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={_text(inner)}" for key, inner in value.items() if inner is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)


def sources(run: Run) -> tuple[Sequence[str], list[Row], str]:
    """Head and rows of the table of sources, and a remark; no rows where the run's folder does not say.

    Tokens and epochs are shown where the token files are still what the run had."""
    listed = [(kind, part, source) for kind, part in _PARTS for source in run.config.get(f"{kind}.{part}") or ()]
    rows = {
        (kind, part, str(source.get("path"))): (str(source.get("path")), _PURPOSE[part], _weight(source, part))
        for kind, part, source in listed
        if isinstance(source, dict)
    }
    if not rows:
        return (), [], ""
    try:
        found = mixture(load_config(run.folder / "config.yaml", [], notice=lambda _: None))
    except (UserError, OSError, ValueError):
        found = []
    known = {
        ("data", "train", row.path): (f"{row.weight:.1%}", f"{row.tokens_available:,}", f"{row.tokens_used:,}",
                                      f"{row.epochs:.2f}")
        for row in found
    }  # fmt: skip
    if not known:
        is_chat = any(kind == "chat" for kind, _, _ in listed)
        remark = "" if is_chat else "The token files are not where the run had them, so their sizes are not shown."
        return ("source", "for", "weight"), list(rows.values()), remark
    nothing = ("—",) * 4
    table: list[Row] = [(*row[:2], *known.get(key, nothing)) for key, row in rows.items()]
    return ("source", "for", "share", "tokens held", "tokens used", "epochs"), table, ""


_PARTS = (("data", "train"), ("data", "eval"), ("chat", "train"), ("chat", "eval"))
_PURPOSE = {"train": "training", "eval": "evaluation"}


def _weight(source: dict[str, Any], part: str) -> str:
    return f"{source.get('weight', 1.0):g}" if part == "train" else "—"
