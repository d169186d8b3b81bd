"""Reads and checks the YAML description of a cluster: which fields there are, their units, and the ranges in which a
value of them is plausible."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from llm_parallel.errors import UserError


@dataclass(frozen=True)
class Quantity:
    """A field that holds a number: its unit, the range that is plausible, and mistakes that give a value outside."""

    unit: str
    """What one of it is, as in ``GB/s``."""
    least: float
    """Smallest value."""
    most: float
    """Largest value."""
    hint: str = ""
    """What a value outside may be a mistake for."""
    required: bool = True
    """Whether a description must state it."""
    whole: bool = False
    """Whether it counts things."""


_FLOPS = Quantity("TFLOP/s (dense, of a data sheet)", 1, 50_000, "989 TFLOP/s are 989, not 9.89e14")
_LINK = "figures in Gbit/s are divided by 8; data sheets state both directions of NVLink together, halve them"
CHIP: Mapping[str, Quantity] = {
    "peak_tflops": _FLOPS,
    "peak_fp8_tflops": _FLOPS,
    "memory_gb_per_s": Quantity("GB/s", 50, 30_000, "3.35 TB/s are 3350"),
    "memory_gib": Quantity("GiB", 4, 2_000, "bytes are divided by 2**30"),
}
"""Fields of ``chip``."""
CLUSTER: Mapping[str, Quantity] = {
    "gpus_per_node": Quantity("GPUs", 1, 1_024, whole=True),
    "nvlink_gb_per_s": Quantity("GB/s of one GPU in one direction", 1, 3_000, _LINK),
    "nic_gb_per_s": Quantity("GB/s of one GPU in one direction", 0.05, 150, "400 Gbit/s are 50 GB/s"),
    "nvlink_latency_us": Quantity("microseconds", 0.1, 1_000, "seconds are multiplied by 1e6", required=False),
    "nic_latency_us": Quantity("microseconds", 0.1, 10_000, "seconds are multiplied by 1e6", required=False),
    "price_per_gpu_hour": Quantity("for a GPU and hour", 0, 1_000, required=False),
}
"""Fields of the cluster itself."""
_SHARE = Quantity("share of the data sheet's figure, as 0.8", 0.01, 1, "80 % is 0.8")
MEASURED: Mapping[str, Quantity] = {
    **dict.fromkeys(("gemm", "gemm_te", "gemm_fp8", "flash", "flash_te", "memory", "nvlink", "nic"), _SHARE),
    **dict.fromkeys(("tp_hidden", "dp_hidden"), Quantity("share that is hidden, as 0.8", 0, 1, "80 % is 0.8")),
    "layer_us": Quantity("microseconds", 0, 10_000),
    "jitter": Quantity("share of a step, as 0.006", 0, 0.5, "0.6 % is 0.006"),
}
"""Constants that ``measured`` may hold."""
_NAMES = {"": {"name", "chip", "measured", "host", *CLUSTER}, "chip": {"name", "constants", *CHIP}}


def read_cluster(text: str, where: str) -> dict[str, Any]:
    """The tree of a description. ``where`` begins the sentences of what is wrong. Raises UserError for text that is not
    YAML, keys that are unknown or given twice, and values that are missing, no numbers or not plausible."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or node is None:
        raise UserError(f"{where} holds no fields; copy the package's planner/data/template.yaml and fill it in")
    _once(node, where, "")
    _known(tree, where, "")
    for name in ("name", "chip"):
        if name not in tree:
            raise UserError(f"{where} lacks {name}; it must have the fields of the package's template.yaml")
    chip = tree["chip"]
    if not isinstance(chip, dict):
        raise UserError(f"{where}: chip is {chip!r}; it must be a section with {', '.join(sorted(_NAMES['chip']))}")
    _known(chip, where, "chip")
    for name in ("name", "constants"):
        if not isinstance(chip.get(name), str) and (name == "name" or "host" not in tree):
            raise UserError(f"{where}: chip.{name} is {chip.get(name)!r}; give a text, as H100")
    if "host" in tree:  # rates of processes on a CPU, which plan --calibrate writes
        return tree
    _numbers(chip, CHIP, where, "chip.")
    _numbers(tree, CLUSTER, where, "")
    measured = tree.get("measured")
    if measured is not None:
        if not isinstance(measured, dict):
            raise UserError(f"{where}: measured is {measured!r}; it must be a section, as measured: {{gemm: 0.78}}")
        _among(measured, set(MEASURED), where, "measured.")
        _numbers(measured, {name: MEASURED[name] for name in measured}, where, "measured.")
    return tree


def _once(node: yaml.Node, where: str, prefix: str) -> None:
    """Raises UserError where a section names a key twice, of which YAML would silently keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise UserError(
                f"{where}: {prefix}{key.value} is given twice, in lines {seen[key.value]} and {line}; keep one"
            )
        seen[key.value] = line
        _once(value, where, f"{prefix}{key.value}.")


def _known(tree: Mapping[str, Any], where: str, section: str) -> None:
    _among(tree, _NAMES[section], where, f"{section}." if section else "")


def _among(tree: Mapping[str, Any], names: set[str], where: str, prefix: str) -> None:
    """Raises UserError for a key that is none of ``names``."""
    for key in tree:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            use = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise UserError(f"{where}: {prefix}{key} is unknown; {use}")


def _numbers(tree: Mapping[str, Any], quantities: Mapping[str, Quantity], where: str, prefix: str) -> None:
    """Raises UserError for a value that is missing, no number, or not plausible."""
    for name, quantity in quantities.items():
        value = tree.get(name)
        if value is None:
            if quantity.required:
                raise UserError(f"{where} lacks {prefix}{name}, in {quantity.unit}")
            continue
        number = as_number(value)
        if number is None or (quantity.whole and number != int(number)):
            kind = "a whole number" if quantity.whole else "a number"
            raise UserError(f"{where}: {prefix}{name} is {value!r}; give {kind}, in {quantity.unit}")
        if not quantity.least <= number <= quantity.most:
            hint = f"; {quantity.hint}" if quantity.hint else ""
            raise UserError(
                f"{where}: {prefix}{name} is {value!r}, and its unit is {quantity.unit}; values from "
                f"{quantity.least:g} to {quantity.most:g} are plausible{hint}"
            )


def as_number(value: Any) -> float | None:
    """The finite number that a value of YAML is, also in the form 1e3 that YAML 1.1 takes for text; None if it is
    none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
