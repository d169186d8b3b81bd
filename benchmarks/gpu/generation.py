"""Generation with our kernels on the GPU, beside torch's attention over the same cache: answers and tokens/s."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import Job

MODEL = {
    "num_layers": 8, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 16, "num_query_groups": 4,
    "vocab_size": 32000, "max_seq_length_tokens": 4096,
}  # fmt: skip
TINY = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 301, "max_seq_length_tokens": 128,
}  # fmt: skip
# (precision, attention); the first two hold our kernels to torch's in fp32.
RUNS = (("fp32", "triton"), ("fp32", "torch"), ("bf16", "triton"), ("bf16", "torch"))
TOLERANCE = 1e-3
"""Of log-probabilities in fp32, whose products our kernels compute as three of tf32: some 2^-21 of the largest."""


def generation(job: Job) -> dict[str, Any]:
    """A row for each run: tokens/s; and the largest difference of log-probabilities in fp32."""
    chosen = machine.start_kernels(job.rehearse)
    from llm_kernels.device import release

    result: dict[str, Any] = {"rows": [], "left_out": []}
    answers = {}
    for precision, attention in RUNS[: 2 if job.rehearse else None]:
        if job.left() < 6.0:
            result["left_out"].append(f"{precision} {attention}")
            continue
        found, row = _answers(precision, attention, job.rehearse)
        answers[precision, attention] = found
        result["rows"].append(row)
        job.save(result)
        release(chosen)
    both = [answers.get(("fp32", attention)) for attention in ("triton", "torch")]
    if both[0] is None or both[1] is None:
        return result
    compared, worst = difference(both[0], both[1])
    result |= {"compared": compared, "worst_difference": worst, "tolerance": TOLERANCE}
    same = compared > 0 and worst <= TOLERANCE  # a NaN is not
    return result if same else {**result, "problem": f"log-probabilities differ by {worst} over {compared} tokens"}


def difference(one: Sequence[Any], other: Sequence[Any]) -> tuple[int, float]:
    """Tokens compared, and the largest difference of their log-probabilities: of each answer up to the first token
    that the two chose differently."""
    compared, worst = 0, 0.0
    for a, b in zip(one, other, strict=True):
        for token, other_token, log_prob, other_log_prob in zip(a.tokens, b.tokens, a.log_probs, b.log_probs):
            if token != other_token:
                break
            compared += 1
            gap = abs(log_prob - other_log_prob)
            worst = gap if not gap <= worst else worst
    return compared, worst


def _answers(precision: str, attention: str, rehearse: bool) -> tuple[list[Any], dict[str, Any]]:
    """Answers to requests of mixed lengths by random weights, the same for every run, and the run's row."""
    from llm_parallel.config.tree import RunConfig
    from llm_parallel.generate.engine import Generator, GeneratorOptions
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    tree = {
        "model": TINY if rehearse else MODEL, "train": {"precision": precision}, "kernels": {"attention": attention},
    }  # fmt: skip
    config = RunConfig.model_validate(tree)
    platform = open_platform("cpu" if rehearse else "cuda")
    close_groups(world=False)  # those of the run before
    network = build_policy(config, open_groups(Layout.from_config(config, 1), 0, platform, config.seed))
    sizes = (4, 40, 3) if rehearse else (64, 2048, 64)
    requests = _requests(sizes, tree["model"]["vocab_size"])
    generator = Generator(network, GeneratorOptions(cache_tokens=sizes[0] * (sizes[1] + sizes[2] + 16)))
    generator.run([requests[0], requests[-1]])  # compiles the kernels for single tokens and for chunks
    generator.refresh()
    began = time.perf_counter()
    found = generator.run(requests)
    seconds = time.perf_counter() - began
    tokens = sum(len(answer.tokens) for answer in found)
    row = {"run": f"{precision}, attention {attention}", "requests": len(found), "tokens": tokens}
    return found, row | {"seconds": seconds, "tokens_per_s": tokens / seconds}


def _requests(sizes: tuple[int, int, int], vocab: int) -> list[Any]:
    """sizes: requests, tokens of the longest prompt, tokens to write."""
    import random

    from llm_parallel.generate.requests import Request
    from llm_parallel.generate.sampling import Sampling

    count, longest, new = sizes
    draw = random.Random(0)
    lengths = [1 + (longest - 1) * number // (count - 1) for number in range(count)]
    return [
        Request(number, tuple(draw.randrange(3, vocab) for _ in range(length)), Sampling(max_new_tokens=new))
        for number, length in enumerate(lengths)
    ]
