"""Numbers, times and layouts as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def plural(noun: str) -> str:
    """``process`` → ``processes``."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def count(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def unbroken(layout: str) -> str:
    """The layout with spaces at which no line is broken."""
    return layout.replace(" ", "\N{NO-BREAK SPACE}")


def changes(values: Sequence[str]) -> str:
    """The values one after the other; of many only the first, the last, and the number of changes."""
    shown = values if len(values) <= 4 else (values[0], "…", values[-1])
    text = " → ".join(map(unbroken, shown)) or "—"
    return text if len(values) <= 4 else f"{text} ({len(values) - 1} changes)"


def written(value: float, form: str, unit: str = "") -> str:
    """The value in that form; a dash if it is not finite."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "—"


def big(value: float) -> str:
    """``819.2 K``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:g}"


def time_text(seconds: float) -> str:
    """The time of a step: ``120 ms``, ``1.23 s``."""
    if not math.isfinite(seconds):
        return "—"
    if abs(seconds) >= 1.0:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms"


def span(seconds: float) -> str:
    """A long time: ``45 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for size, unit in ((172800.0, "days"), (7200.0, "h"), (120.0, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400.0, 'h': 3600.0, 'min': 60.0}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"
