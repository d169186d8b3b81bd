"""Matrix products of training in fp32 on one CPU thread: torch's own beside oneDNN's, GFLOP/s of processor time.

python benchmarks/cpu_products.py
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_parallel.parallel.cpu_products import as_torch_multiplies, install, is_faster

SHAPES = {
    "1 M model, 2,048 tokens": (2048, 128, 704),
    "17 M model, 512 tokens": (512, 512, 1376),
    "SmolLM2-135M, 256 tokens": (256, 576, 1536),
    "SmolLM2-135M, logits of 256 tokens": (256, 576, 49152),
}
"""Tokens, inputs and outputs of a linear layer."""


def rate(product: Callable[[], torch.Tensor], operations: float, rounds: int) -> float:
    """Most GFLOP/s over the rounds."""
    calls, best = max(2, int(1e9 / operations)), float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            product()
        best = min(best, (time.process_time() - began) / calls)
    return operations / best / 1e9


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    install()
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, oneDNN is taken here: {is_faster()}"
    )
    print("| layer | product | torch | oneDNN |\n| --- | --- | --- | --- |")
    for name, (tokens, inputs, outputs) in SHAPES.items():
        x, weight, gradient = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        products: dict[str, Callable[[], torch.Tensor]] = {
            "forward": lambda x=x, weight=weight: x @ weight.t(),
            "gradient of the input": lambda gradient=gradient, weight=weight: gradient @ weight,
            "gradient of the weight": lambda gradient=gradient, x=x: gradient.t() @ x,
        }
        for kind, product in products.items():
            with as_torch_multiplies():
                own = rate(product, 2.0 * tokens * inputs * outputs, rounds)
            other = rate(product, 2.0 * tokens * inputs * outputs, rounds)
            print(f"| {name} | {kind} | {own:.0f} | {other:.0f} |")


if __name__ == "__main__":
    main()
