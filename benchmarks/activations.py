"""Counts the bytes that one layer keeps for backward with torch's operators and with our kernels.

    python benchmarks/activations.py [--preset llama2-7b] [--seq 4096] [--micro-batch 1] [--save]

The layer's forward pass runs on fake tensors (shapes and dtypes without memory), so any size works on any machine;
hooks of autograd see every tensor that is saved. A storage is counted once, and weights are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from datetime import date
from pathlib import Path

from llm_parallel.files import atomic_write
from llm_parallel.quiet import quiet_libraries

OPERATORS = ("rms_norm", "rope", "attention", "swiglu")
CHOICES = {"torch": "plain torch operators", "triton": "our kernels"}


def saved_bytes(preset: str, seq: int, rows: int, kernels: str) -> Counter[str]:
    """Bytes that one layer saves for backward, by shape and dtype of the saved tensor."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llm_parallel.config.presets import MODEL_PRESETS
    from llm_parallel.config.tree import DataConfig, KernelsConfig, ModelConfig, RunConfig, TrainConfig
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.model.sequence import sequence_info
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    model = ModelConfig(**{**MODEL_PRESETS[preset], "num_layers": 1, "vocab_size": 128})
    config = RunConfig(
        device="cpu",
        model=model,
        data=DataConfig(seq_length_tokens=seq),
        train=TrainConfig(precision="bf16", micro_batch_size=rows, global_batch_size=rows),
        kernels=KernelsConfig(**dict.fromkeys(OPERATORS, kernels)),
    )
    groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu"), 1)
    (chunk,) = build_policy(config, groups).models
    chunk.bfloat16()
    layer = chunk.decoder.layers[0]
    weights = {p.untyped_storage()._cdata for p in chunk.parameters()}
    info = sequence_info((range(seq),), None, chunk.angles, (rows, seq))
    info.rope.full(seq)  # the table belongs to the model, not to the layer
    table = {x.untyped_storage()._cdata for x in (*info.rope.full(seq), info.rope.cos, info.rope.sin)}
    found: dict[int, tuple[str, int]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights | table and not isinstance(x, torch.nn.Parameter):
            found[storage._cdata] = (f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}", storage.nbytes())
        kept.append(x)  # a freed storage's number would be given out again
        return x

    kept: list[torch.Tensor] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(seq, rows, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer(hidden_states=x, attention_mask=None, packed_seq_params=info)
    close_groups()
    total: Counter[str] = Counter()
    for what, size in found.values():
        total[what] += size
    return total


def main() -> None:
    """Prints both counts and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama2-7b")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write the result under benchmarks/results")
    args = parser.parse_args()
    quiet_libraries()
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are asked for on a CPU; on fake tensors none of them runs
    totals = {}
    for kernels, title in CHOICES.items():
        found = saved_bytes(args.preset, args.seq, args.micro_batch, kernels)
        totals[kernels] = sum(found.values())
        print(f"{args.preset}, one layer, {args.seq} tokens x {args.micro_batch}, bf16, {title}: ", end="")
        print(f"{totals[kernels]:,} bytes ({totals[kernels] / (args.seq * args.micro_batch):,.0f} a token)")
        for what, size in found.most_common():
            print(f"    {size:>13,}  {what}")
    saved = totals["torch"] - totals["triton"]
    print(f"Our kernels keep {saved:,} bytes a layer less ({saved / totals['torch']:.1%}).")
    if args.save:
        path = Path(__file__).parent / "results" / f"activations_{args.preset}_{date.today()}.json"
        result = {"preset": args.preset, "seq": args.seq, "micro_batch": args.micro_batch, "bytes": totals}
        with atomic_write(path) as handle:
            handle.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
