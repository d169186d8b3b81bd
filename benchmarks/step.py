"""One training step on one process, beside its peers: ours, transformers' Llama with torch AdamW, bare megatron-core.

    python benchmarks/step.py [--rounds 5] [--steps 2] [--threads 2] [--hidden 384 --layers 6 …]

Each contender lives in its own process (megatron-core on CPU needs a function mode that would slow the others) and they
take turns: every round times each of them once, in rotated order, so that they see the same machine. The step is
forward, backward, gradient clipping and AdamW on the same batch shape in fp32. Ratios are medians over paired rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

Step = Callable[[], float]


def ours(args: argparse.Namespace) -> Step:
    """Our model, engine and step at one process."""
    import torch

    from llm_parallel.config.tree import DataConfig, ModelConfig, RunConfig, TrainConfig
    from llm_parallel.data.loader import Batch
    from llm_parallel.model.gpt import build_chunks
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.parallel.wrap import wrap
    from llm_parallel.train.step import apply_gradient, forward_backward

    config = RunConfig(
        device="cpu",
        model=ModelConfig(
            num_layers=args.layers,
            hidden_size=args.hidden,
            ffn_hidden_size=args.ffn,
            num_attention_heads=args.heads,
            num_query_groups=args.groups,
            vocab_size=args.vocab,
        ),
        data=DataConfig(seq_length_tokens=args.seq),
        train=TrainConfig(global_batch_size=args.batch, micro_batch_size=args.batch),
    )
    groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu", threads=args.threads), 1)
    engine = wrap(build_chunks(config, groups), config, groups, overlap=False)
    tokens, labels = batch(args)
    micro_batch = Batch(tokens, labels, torch.ones(tokens.shape), None)

    def step() -> float:
        outcome = forward_backward(engine, [micro_batch])
        apply_gradient(engine, outcome, 1e-3, 1.0)
        return outcome.loss

    return step


def transformers_step(args: argparse.Namespace) -> Step:
    """Hugging Face's LlamaForCausalLM (SDPA) with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.groups,
        vocab_size=args.vocab,
        max_position_embeddings=args.seq,
        use_cache=False,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, labels = batch(args)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def bare_megatron(args: argparse.Namespace) -> Step:
    """megatron-core's own local layer spec, loss, DDP and distributed optimizer; ours is what lets it run on CPU."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    groups = open_groups(Layout(stage_layers=(args.layers,)), 0, open_platform("cpu", threads=args.threads), 1)
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=args.vocab, max_sequence_length=args.seq, position_embedding_type="rope")
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunk = DistributedDataParallel(config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, use_distributed_optimizer=True),
        [chunk],
        use_gloo_process_groups=False,
    )
    config.finalize_model_grads_func = lambda models, count, **_: finalize_model_grads(
        models, count, pg_collection=groups.collection
    )
    tokens, labels = batch(args)
    positions = torch.arange(args.seq).expand(args.batch, -1)
    mask = ~torch.ones(1, 1, args.seq, args.seq, dtype=torch.bool).tril()

    def loss_sum(losses: Any) -> Any:
        total = losses.sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int32), {"loss": total.detach()}

    def forward(_: Any, model: Any) -> Any:
        return model(tokens, positions, mask, labels=labels), loss_sum

    def step() -> float:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=[chunk],
            num_microbatches=1,
            seq_length=args.seq,
            micro_batch_size=args.batch,
            forward_only=False,
        )
        optimizer.step()
        return float(found[0]["loss"]) / tokens.numel()

    return step


def batch(args: argparse.Namespace) -> tuple[Any, Any]:
    """Random tokens and labels, int64 [batch, seq]."""
    import torch

    tokens = torch.randint(0, args.vocab, (args.batch, args.seq + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CONTENDERS = {"llm-parallel": ours, "transformers": transformers_step, "megatron-core": bare_megatron}


def serve(name: str, args: argparse.Namespace, pipe: Any) -> None:
    """Contender's process: warms up, then times ``steps`` steps at each request."""
    warnings.filterwarnings("ignore")
    step = CONTENDERS[name](args)
    pipe.send(step())  # the first loss, and warm-up
    step()
    while pipe.recv():
        started = time.perf_counter()
        for _ in range(args.steps):
            step()
        pipe.send((time.perf_counter() - started) / args.steps)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step of each contender in each round."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in args.contenders:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(name, args, there), daemon=True)
        process.start()
        print(f"{name}: first loss {here.recv():.4f}", flush=True)
        pipes[name] = here
        processes.append(process)
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    names = list(pipes)
    for round_number in range(args.rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    for name, process in zip(names, processes):
        with contextlib.suppress(BrokenPipeError):
            pipes[name].send(False)
        process.join(timeout=10)
    return seconds


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints and returns tokens/s and paired ratios."""
    tokens = args.batch * args.seq
    print(
        f"\nmeasured on {cpu_name()}, {args.threads} threads, fp32, {args.rounds} paired rounds of {args.steps} steps"
    )
    print("| contender | tokens/s (median) | spread | ours / it (median of paired rounds) |\n| --- | --- | --- | --- |")
    rows = {}
    for name, times in seconds.items():
        rates = [tokens / value for value in times]
        ratio = statistics.median(theirs / mine for mine, theirs in zip(seconds["llm-parallel"], times))
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows[name] = {"tokens_per_s": rates, "ratio": ratio}
        print(f"| {name} | {statistics.median(rates):,.0f} | {spread} | {ratio:.3f} |")
    return rows


def cpu_name() -> str:
    """Model name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the commit that is measured."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"


def main() -> None:
    """Measures and optionally writes a result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "hidden": 384, "ffn": 1024, "heads": 6, "groups": 6, "vocab": 8192, "seq": 256, "batch": 4}
    for name, value in {**sizes, "rounds": 5, "steps": 2, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step_cpu_DATE.json")
    args = parser.parse_args()
    rows = report(args, measure(args))
    if args.save:
        import torch

        result = {
            "command": f"python benchmarks/step.py --rounds {args.rounds} --steps {args.steps}",
            "chip": cpu_name(),
            "date": date.today().isoformat(),
            "commit": commit(),
            "torch": torch.__version__,
            "settings": vars(args),
            "results": rows,
        }
        path = Path(__file__).parent / "results" / f"step_cpu_{date.today().isoformat()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
