"""The request of ``bench step``, and what its two measurements (step.py on one device, layout_step.py on several
processes) both need of it: the configuration, its label and the peak that MFU is a share of."""

from __future__ import annotations

from shlex import quote

import torch

from llm_parallel.bench.requests import StepRequest
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.metrics.peaks import Peak, find_peak
from llm_parallel.train.preflight import with_vocabulary

# Relative difference of the first losses, above which two contenders do not train the same model. bf16 rounds to 2^-8.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def read_request(request: StepRequest) -> RunConfig:
    """The configuration that a request names, with its vocabulary. Raises UserError."""
    files = [text for text in request.arguments if "=" not in text and not text.startswith("--")]
    overrides = [text for text in request.arguments if text not in files]
    if len(files) > 1:
        raise UserError(f"bench step takes one run file, not {' and '.join(files)}; overrides are section.field=value")
    if not files and request.model is None:
        raise UserError("bench step needs a run file or --model PRESET, for example --model llama3-8b")
    if request.model is not None:
        overrides = [f"model.preset={request.model}", *overrides]
    config = with_vocabulary(load_config(files[0] if files else None, overrides))
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is not set and no tokenizer gives it; add model.vocab_size=32000")
    return config


def peak_of(config: RunConfig) -> Peak:
    """The GPU's data-sheet peak; on a CPU the measured rate of a large product, since its cores have no such figure."""
    if config.device == "cuda" or config.log.peak_tflops:
        name = torch.cuda.get_device_name() if config.device == "cuda" else "CPU"
        return find_peak(name, config.log.peak_tflops)
    from torch.utils.benchmark import Timer

    threads = config.train.threads_per_process or torch.get_num_threads()
    a = torch.randn(2048, 2048)
    timer = Timer("a @ a", globals={"a": a}, num_threads=threads)
    seconds = timer.blocked_autorange(min_run_time=1.0).median
    return Peak(2 * 2048**3 / seconds / 1e12, f"fp32 product of 2048 x 2048 measured here on {threads} threads")


def label(config: RunConfig) -> str:
    """Names model and batch: what two results must share to be compared."""
    model = config.model
    name = model.preset or "custom"
    return (
        f"{name} L{model.num_layers} h{model.hidden_size} v{model.vocab_size} s{config.data.seq_length_tokens} "
        f"b{config.train.global_batch_size}/{config.train.micro_batch_size}"
    )


def after_step(request: StepRequest) -> str:
    """The command to try after ``bench step``: hold a later version against this result, or write it first."""
    if request.out:
        return f"{request.command} --baseline {quote(f'{request.out}.json')}"
    return f"{request.command} --out runs/step"
