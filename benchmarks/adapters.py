"""Processor time of training with adapters, ours against transformers and PEFT: the same weights and tokens, one
thread, in turns in one process.

    python benchmarks/adapters.py --rounds 7 --out benchmarks/results/adapters_cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measured_on import measured_on
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import CheckpointConfig, RunConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import read_hf_config
from llm_parallel.parallel.cpu_products import as_torch_multiplies

ROOT = Path(__file__).parents[1]
LR, RANK, ALPHA = 1e-3, 8, 16


def bench_config(base: str | None, kind: str, given: bool = False) -> RunConfig:
    """The 17 M parameter model of ``configs/bench-17m.yaml``, or that of a Hugging Face folder that was given with one
    sample a step, in fp32 on one thread."""
    config = load_config(str(ROOT / "configs/bench-17m.yaml"), notice=lambda _: None)
    if given:
        assert base is not None
        model = hf_config_to_model(read_hf_config(base))
        train = config.train.model_copy(update={"global_batch_size": 1, "micro_batch_size": 1})
        config = config.model_copy(update={"model": model, "train": train})
    settings = {"full": None, "lora": "full", "nf4": "nf4", "int8": "int8"}[kind]
    adapter = AdapterConfig(rank=RANK, alpha=ALPHA, base=settings) if settings else None
    train = config.train.model_copy(update={"precision": "fp32", "threads_per_process": 1})
    optim = config.optim.model_copy(update={"lr": LR, "weight_decay": 0.0, "beta2": 0.95, "clip_grad": 1.0})
    parts = {"device": "cpu", "adapter": adapter, "train": train, "optim": optim}
    return config.model_copy(update={**parts, "checkpoint": CheckpointConfig(load=base)})


def write_base(folder: Path) -> None:
    """The model's initial weights as a Hugging Face folder."""
    from llm_parallel.checkpoint.state import TrainState
    from llm_parallel.checkpoint.store import CheckpointStore
    from llm_parallel.convert.export import export_to_hf
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.open import policy_engine

    config = bench_config(None, "full")
    groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu", 0, 1), config.seed)
    engine = policy_engine(config, groups)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint, config, groups)
    store.save({"policy": engine}, TrainState(), blocking=True)
    close_groups()
    export_to_hf(folder / "checkpoints", folder / "hf")


def our_step(config: RunConfig, groups: Any, tokens: torch.Tensor) -> Callable[[], float]:
    """A function that makes one optimizer step and returns its loss."""
    from llm_parallel.checkpoint.base import load_base
    from llm_parallel.data.batch import Batch
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.train.open import likelihood, policy_engine
    from llm_parallel.train.step import apply_gradient, forward_backward

    base, engine = config.checkpoint.load, policy_engine(config, groups)
    assert base is not None
    if engine.network.base is None:
        load_hf_weights(base, engine.models)
        engine.optimizer.reload_model_params()
    else:
        load_base(base, engine.network)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(tokens[:, 1:].shape))

    def step() -> float:
        outcome = forward_backward(engine, likelihood(config), [batch])
        apply_gradient(engine, outcome, LR, 1.0)
        return outcome.loss

    return step


def their_step(base: str, kind: str, tokens: torch.Tensor) -> Callable[[], float]:
    """The same of transformers and PEFT, with bitsandbytes' 4-bit linears for ``nf4``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, **options).train()
    if kind != "full":
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    @as_torch_multiplies()
    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(kinds: list[str], rounds: int, given: str | None) -> list[dict[str, Any]]:
    """Tokens per processor-second of every kind, ours and theirs, over rounds in turns."""
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    found = []
    with tempfile.TemporaryDirectory() as name:
        if given is None:
            write_base(Path(name))
        base = given or f"{name}/hf"
        config = bench_config(base, "full", given is not None)
        groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu", 0, 1), config.seed)
        shape = (config.train.micro_batch_size, config.data.seq_length_tokens + 1)
        tokens = torch.randint(0, config.model.vocab_size or 1, shape, generator=torch.Generator().manual_seed(0))
        for kind in kinds:
            ours = our_step(bench_config(base, kind, given is not None), groups, tokens)
            steps = {"ours": ours, "theirs": their_step(base, kind, tokens)}
            first = {name: step() for name, step in steps.items()}
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    began = time.process_time()
                    step()
                    seconds[name].append(time.process_time() - began)
            rates = {name: tokens[:, 1:].numel() / statistics.median(times) for name, times in seconds.items()}
            spread = {name: (max(times) - min(times)) / statistics.median(times) for name, times in seconds.items()}
            row = {"kind": kind, "first_loss": first, "tokens_per_processor_s": rates, "spread": spread}
            found.append({**row, "ratio": rates["ours"] / rates["theirs"]})
            print(
                f"{kind}: ours {rates['ours']:,.0f}, theirs {rates['theirs']:,.0f} tokens/processor-s, ratio "
                f"{found[-1]['ratio']:.2f}; first losses {first['ours']:.5f} {first['theirs']:.5f}",
                flush=True,
            )
    return found


def main() -> None:
    """Measures, and writes what was measured with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["full", "lora", "nf4"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", help="Hugging Face folder to take instead of the 17 M parameter model")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = measure(asked.kinds, asked.rounds, asked.base)
    if asked.out:
        about = {**measured_on("peft", "bitsandbytes"), "threads": 1, "rounds": asked.rounds}
        asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
