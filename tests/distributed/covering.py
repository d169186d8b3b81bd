"""A covering array: few layouts in which every two settings that may occur together do occur together.

A setting that breaks another one by itself is found by some row; what needs three at once is left to the full list of
``layouts.MATRIX``, which is slow. A new method adds an axis here and few or no rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

AXES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "cp": (1, 2, 4),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "dp": (1, 2, 4),
    "sp": (False, True),
    "stages": ("even", "uneven"),
    "overlap": ("off", "on", "small buckets"),
    "micro_batch": (1, 2),
    "optimizer": ("distributed", "plain"),
    "tied": (False, True),
    "packing": ("none", "isolate"),
    "recompute": ("none", "selective", "uniform", "block"),
    "vocabulary": (128, 101),
    "objective": ("likelihood", "preferences"),
    "adapter": ("none", "all", "some", "nf4"),
    "noise": ("none", "neftune"),
}
"""Axis → its values, the plain one first. ``changes`` says what each value is in a run's configuration."""

MESH = ("tp", "cp", "pp", "vpp", "dp", "sp", "stages", "overlap", "micro_batch")
"""Axes that the rules of ``legal`` tie together; the others go with everything."""

MAX_PROCESSES, GLOBAL_BATCH = 8, 8

Setting = tuple[str, Any]
Pair = tuple[Setting, Setting]

NEVER: frozenset[Pair] = frozenset({(("packing", "none"), ("objective", "preferences"))})
"""Settings of free axes that exclude each other: a pair of answers is two documents. A row with ``preferences``
runs every objective over answers (``tests/support/preference_job.py``): each meets every setting without own rows."""


def processes(row: Mapping[str, Any]) -> int:
    """Ranks of a row."""
    return row["tp"] * row["cp"] * row["pp"] * row["dp"]


def num_layers(row: Mapping[str, Any]) -> int:
    """Layers of a row's model: four, or what its pipeline needs."""
    chunks = row["pp"] * row["vpp"]
    return 6 if row["stages"] == "uneven" and chunks == 4 else max(4, chunks)


def legal(row: Mapping[str, Any]) -> bool:
    """Whether the axes of ``MESH`` may take these values together, each with an effect of its own."""
    chunks, replicas = row["pp"] * row["vpp"], row["dp"] * row["cp"]
    interleaved = row["pp"] if row["vpp"] > 1 else 1
    return (
        processes(row) <= MAX_PROCESSES
        and (row["vpp"] == 1 or row["pp"] > 1)
        and (not row["sp"] or row["tp"] > 1)
        and (row["stages"] == "even" or chunks in (2, 4))
        and (row["overlap"] == "off" or replicas > 1)
        and GLOBAL_BATCH % (row["micro_batch"] * row["dp"] * interleaved) == 0
    )


def meshes() -> list[dict[str, Any]]:
    """Every legal combination of the axes of ``MESH``."""
    product = itertools.product(*(AXES[name] for name in MESH))
    return [row for values in product if legal(row := dict(zip(MESH, values)))]


def pairs(row: Mapping[str, Any]) -> Iterator[Pair]:
    """Every two settings of a row, in the order of the axes."""
    return itertools.combinations(row.items(), 2)


def legal_pairs() -> set[Pair]:
    """Every two settings that some legal row has."""
    found = {pair for mesh in meshes() for pair in pairs(mesh)}
    settings = {setting for pair in found for setting in pair}
    free = {name: values for name, values in AXES.items() if name not in MESH}
    for number, (name, values) in enumerate(free.items()):
        mine = [(name, value) for value in values]
        others = [(other, value) for other in list(free)[number + 1 :] for value in free[other]]
        found |= set(itertools.product(settings, mine)) | set(itertools.product(mine, others))
    return found - NEVER


def _completed(mesh: Mapping[str, Any], seed: Mapping[str, Any], missing: set[Pair]) -> tuple[dict[str, Any], int]:
    """A mesh with the values of ``seed``, and on the other free axes, one after the other, those that have most pairs
    still missing; and how many missing pairs the row has."""
    row = {axis: mesh.get(axis, seed.get(axis)) for axis in AXES}
    known = [axis for axis in AXES if axis in mesh or axis in seed]
    for axis in (axis for axis in AXES if axis not in known):
        gains = {}
        for value in AXES[axis]:
            met = [_ordered((other, row[other]), (axis, value)) for other in known]
            if not NEVER & set(met):
                gains[value] = sum(pair in missing for pair in met)
        row[axis] = max(gains, key=gains.__getitem__)
        known.append(axis)
    return row, sum(pair in missing for pair in pairs(row))


def _ordered(*settings: Setting) -> Pair:
    one, two = sorted(settings, key=lambda setting: list(AXES).index(setting[0]))
    return one, two


def covering_array() -> tuple[dict[str, Any], ...]:
    """Rows in which every pair of ``legal_pairs`` occurs; the same at every call.

    Greedy: each row holds the first pair that is missing, and as many of the others as can be; among equals it has the
    fewest processes, which are what a row costs.
    """
    missing, rows = legal_pairs(), []
    while missing:
        seed = dict(min(missing, key=_rank))
        candidates = [mesh for mesh in meshes() if all(mesh.get(axis, value) == value for axis, value in seed.items())]
        found = (_completed(mesh, seed, missing) for mesh in candidates)
        row, _ = max(found, key=lambda row_gain: (row_gain[1], -processes(row_gain[0])))
        missing -= set(pairs(row))
        rows.append(row)
    return tuple(rows)


def _rank(pair: Pair) -> tuple[int, ...]:
    """Where a pair stands: of the axes' later values, which the fewest meshes have, first."""
    places = [(list(AXES).index(axis), AXES[axis].index(value)) for axis, value in pair]
    return (-sum(value for _, value in places), *(axis for axis, _ in places), *(value for _, value in places))


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"parallel.recompute": "selective", "parallel.recompute_modules": ["core_attn", "mlp"]},
    "uniform": {"parallel.recompute": "full"},
    "block": {"parallel.recompute": "full", "parallel.recompute_method": "block", "parallel.recompute_num_layers": 2},
}
ADAPTER: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {
        "adapter.rank": 4,
        "adapter.targets": ("q", "k", "v", "o", "gate", "up", "down", "embed_tokens", "lm_head"),
    },
    "nf4": {"adapter.rank": 4, "adapter.base": "nf4"},
    "some": {
        "adapter.rank": 3,
        "adapter.targets": ("v", "q", "o", "up"),
        "adapter.rank_stabilized": True,
        "adapter.dora": True,
        "adapter.base": "int8",
    },
}
UNEVEN = {2: [3, 1], 4: [2, 1, 1, 2]}


def reference_changes(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row alters the mathematics, as section.field → value: its one-process run has it too."""
    changes: dict[str, Any] = {"model.num_layers": num_layers(row), "model.vocab_size": row["vocabulary"]}
    if row["tied"]:
        changes["model.tie_embeddings"] = True
    if row["packing"] != "none":
        changes["data.packing"] = row["packing"]
    if row["noise"] != "none":
        changes |= {"method.kind": "sft", "chat.neftune_alpha": 5.0}
    return changes | ADAPTER[row["adapter"]]


def changes(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as section.field → value over the base configuration."""
    found = reference_changes(row) | RECOMPUTE[row["recompute"]]
    found |= {f"parallel.{name}": row[name] for name in ("tp", "cp", "pp", "vpp", "dp")}
    found["train.micro_batch_size"] = row["micro_batch"]
    found["parallel.distributed_optimizer"] = row["optimizer"] == "distributed"
    found["parallel.overlap"] = row["overlap"] != "off"
    if row["overlap"] == "small buckets":
        found["parallel.bucket_size"] = 3000
    if row["tp"] > 1:
        found["parallel.sequence_parallel"] = row["sp"]
    if row["stages"] == "uneven":
        found["parallel.stage_layers"] = UNEVEN[row["pp"] * row["vpp"]]
    return found


def name(row: Mapping[str, Any]) -> str:
    """Axis and value of everything in a row that is not plain."""
    parts = []
    for axis, value in row.items():
        if value != AXES[axis][0]:
            parts.append(axis if value is True else f"{axis}{value}" if isinstance(value, int) else value)
    return " ".join(parts) or "plain"
