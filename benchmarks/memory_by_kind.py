"""Memory of one training process by kind, as it is held and as ``--dry-run`` predicts it: full, LoRA and QLoRA (NF4),
with AdamW's moments in 32 and 8 bits, on the 17 M parameter model and on a Hugging Face folder.

    python benchmarks/memory_by_kind.py [--base ~/.cache/llm-parallel-tests/smollm2-135m] [--seq 256] [--out FILE]

Activations are counted by autograd's hooks: every storage that is saved for backward, once, while it is held. Weights,
gradients and optimizer state are the bytes of their tensors. Nothing is timed, so any machine gives the same table.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RunConfig, TrainConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import read_hf_config
from llm_parallel.planner.memory import memory
from llm_parallel.planner.shapes import shape_of, strategy_of

ROOT = Path(__file__).parents[1]
ADAPTERS = {
    "full": None,
    "LoRA": AdapterConfig(rank=8, alpha=16),
    "LoRA on q and v": AdapterConfig(rank=8, alpha=16, targets=("q", "v")),
    "QLoRA": AdapterConfig(rank=8, alpha=16, base="nf4"),
}
KINDS = ("weights", "gradients", "optimizer", "activations")


def configuration(base: str | None, kind: str, bits: int, seq: int, precision: str) -> RunConfig:
    """One micro batch of one sample, on one thread of the CPU."""
    config = load_config(str(ROOT / "configs/bench-17m.yaml"), notice=lambda _: None)
    model = hf_config_to_model(read_hf_config(base)) if base else config.model
    train = TrainConfig(precision=precision, global_batch_size=1, micro_batch_size=1, threads_per_process=1, steps=1)
    parts: dict[str, Any] = {"device": "cpu", "model": model, "train": train, "adapter": ADAPTERS[kind]}
    parts["data"] = config.data.model_copy(update={"seq_length_tokens": seq})
    parts["optim"] = config.optim.model_copy(update={"moment_bits": bits})
    return config.model_copy(update=parts)


def _measured(config: RunConfig, answer: Any) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.unit.planner_trainer import measure_config

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    answer.put(measure_config(config, 0, 1))


def measured(config: RunConfig) -> dict[str, int]:
    """Bytes by kind of one step in a process of its own."""
    context = get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_measured, args=(config, answer))
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return {**{kind: found[kind] for kind in KINDS[:3]}, "activations": found["saved"]}


def predicted(config: RunConfig) -> dict[str, float]:
    """What ``--dry-run`` says."""
    sizes = memory(shape_of(config.model), strategy_of(config, 1, "cpu")).by_kind()
    return {**{kind: sizes[kind] for kind in KINDS[:3]}, "activations": sizes["activations"] + sizes["logits"]}


def main() -> None:
    """Prints a table, and fails if a prediction is off by 5 % or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="Hugging Face folder to measure beside the 17 M parameter model")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | kind | moments | " + " | ".join(f"{kind} MiB | error" for kind in KINDS) + " |")
    print("| --- " * (3 + 2 * len(KINDS)) + "|")
    for base in (None, *([asked.base] if asked.base else [])):
        for kind in ADAPTERS:
            for bits in (32, 8):
                config = configuration(base, kind, bits, asked.seq, asked.precision)
                held, expected = measured(config), predicted(config)
                name = Path(base).name if base else "17 M"
                cells = [f"{held[one] / 2**20:.2f} | {expected[one] / held[one] - 1:+.2%}" for one in KINDS]
                print(f"| {name} | {kind} | {bits} | {' | '.join(cells)} |", flush=True)
                rows.append({"model": name, "kind": kind, "moment_bits": bits, "held": held, "predicted": expected})
    worst = max(abs(row["predicted"][kind] / row["held"][kind] - 1) for row in rows for kind in KINDS)
    print(f"\nlargest error {worst:.2%}")
    if asked.out:
        about = {"command": " ".join(sys.argv[1:]), "seq": asked.seq, "precision": asked.precision}
        asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    sys.exit(worst >= 0.05)


if __name__ == "__main__":
    main()
