"""What a dry run and the start of a run show: settings and where they come from, layout, mixture, memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_parallel.config.differences import differences, origin_of
from llm_parallel.config.load import dump_config
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.parallel.layout import Layout
from llm_parallel.planner.memory import CONTEXT_BYTES, memory
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.screen import show, show_table
from llm_parallel.train.preflight import expected_device, mixture, rank_table
from llm_parallel.train.room import also_trained, checkpoint_bytes, checkpoints_at_once, existing_part, free_bytes
from llm_parallel.worker.chat_table import show_conversations, show_preferences, show_rounds

MOST_RANKS = 16
"""Ranks that a dry run lists unless all are wanted."""


def show_mixture(config: RunConfig) -> None:
    """Prints tokens and epochs of each source before anything starts."""
    if config.collects:
        show_rounds(config)
        return
    if config.prefers:
        show_preferences(config)
        return
    if config.trains == "sft":
        show_conversations(config)
        return
    rows = [
        (row.path, f"{row.weight:.4f}", f"{row.tokens_available:,}", f"{row.tokens_used:,}", f"{row.epochs:.2f}")
        for row in mixture(config)
    ]
    show_table("Training mixture", ("source", "weight", "tokens held", "tokens used", "epochs"), rows)


def show_plan(
    config: RunConfig, world_size: int | None, origins: Mapping[str, str] | None = None, everything: bool = False
) -> None:
    """What a dry run prints: what is not as by default and where that was given (``origins``), layout, ranks, mixture,
    memory and disk; with ``everything`` the whole configuration and all ranks too."""
    layout = Layout.from_config(config, world_size or num_processes(config))
    if everything:
        show(dump_config(config))
    found = [(one.name, one.value, one.default, origin_of(one.name, origins or {})) for one in differences(config)]
    shown = [row for row in found if everything or not row[-1].startswith("preset ")]
    show_table("Settings other than the defaults", ("field", "value", "default", "given in"), shown)
    if len(shown) < len(found):
        show(f"and {len(found) - len(shown)} fields of model.preset={config.model.preset} (--all)")
    show(layout.describe())
    ranks = rank_table(layout)
    left = 0 if everything else max(0, len(ranks) - MOST_RANKS)
    show("\n".join(ranks[: len(ranks) - left]))
    if left:
        show(f"and {left} more ranks (--all)")
    show_mixture(config)
    show(
        f"{_memory(config, layout.world_size)}\n"
        f"checkpoints: {_size(checkpoint_bytes(config))} each, at most {checkpoints_at_once(config)} at a time; "
        f"{_size(free_bytes(existing_part(Path(config.run_dir))))} are free for run_dir = {config.run_dir}"
    )


HELD = ("weights", "gradients", "optimizer")
"""Kinds of memory that a model holds while another one is trained."""


def _memory(config: RunConfig, world_size: int) -> str:
    """What the fullest process will hold, in words. Of two models that are trained in turn, activations of the larger
    ones are there at a time."""
    device = expected_device(config)
    trained = (config, *also_trained(config))
    models = [memory(shape_of(one.model), strategy_of(one, world_size, device)) for one in trained]
    kinds = [one.by_kind() for one in models]
    sizes = {name: (sum if name in HELD else max)(kind[name] for kind in kinds) for name in kinds[0]}
    named = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    of = " of policy and critic" if len(models) > 1 else ""
    besides = "; a reference or reward models in memory come on top" if config.collects else ""
    return (
        f"predicted memory of the fullest process: {_size(sum(sizes.values()))} of tensors{of} ({named}), and about "
        f"{_size(CONTEXT_BYTES)} of context on a GPU{besides}"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
