"""``llm-parallel convert``: Hugging Face folders ↔ our checkpoints; adapters → PEFT folders or merged models."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from llm_parallel.convert.adapters import export_merged, export_to_peft
from llm_parallel.convert.export import export_to_hf
from llm_parallel.convert.importing import import_from_hf
from llm_parallel.convert.verify import verify as verified
from llm_parallel.convert.verify import verify_adapters
from llm_parallel.errors import UserError
from llm_parallel.generate.load import describe_folder, newest_said
from llm_parallel.lines import say
from llm_parallel.model.flops import adapter_parameters, parameter_count
from llm_parallel.model.hf import is_hf_folder
from llm_parallel.model.hf_files import is_peft_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert_command(
    source: str,
    target: str,
    *,
    verify: bool = True,
    max_shard_gb: float = 5.0,
    dtype: str | None = None,
    merge: bool = False,
) -> Path:
    """Converts in the direction that follows from the kind of ``source``, prints what was done, and how far the logits
    of the Hugging Face folder in transformers are from ours; returns the folder written. Adapters become a PEFT folder,
    or with ``merge`` are added to the model under them.

    dtype: fp32, bf16 or fp16; that of the source if not given. Raises UserError as the directions do, and if the logits
    differ by more than rounding."""
    if max_shard_gb <= 0:
        raise UserError(f"max_shard_gb is {max_shard_gb}; it must be over 0")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be {', '.join(DTYPES)}, or left out to keep the source's")
    if Path(source).resolve() == Path(target).resolve():
        raise UserError(f"{source} is source and target; give another folder for what is written")
    wanted = DTYPES[dtype] if dtype is not None else None
    config = describe_folder(source)
    if merge and config.adapter is None:
        raise UserError(f"{source} holds no adapters that could be merged; leave --merge out")
    if is_peft_folder(source) and not merge:
        raise UserError(
            f"{source} is a PEFT adapter; begin a run from it by adapter.load, or merge it into its model by --merge"
        )
    source = newest_said(source)
    count = parameter_count(config.model).total
    to_hf = not is_hf_folder(source)
    started = time.perf_counter()
    if config.adapter is not None:
        if wanted is not None and not merge:
            raise UserError(f"dtype is {dtype!r}, and adapters are written as they are; leave it out")
        size = int(max_shard_gb * 1e9)
        written = export_merged(source, target, size, wanted) if merge else export_to_peft(source, target)
    elif to_hf:
        written = export_to_hf(source, target, int(max_shard_gb * 1e9), wanted)
    else:
        written = import_from_hf(source, target, config, dtype=wanted)
    seconds = time.perf_counter() - started
    kind = "Hugging Face folder" if to_hf else "checkpoint"
    if config.adapter is not None and not merge:
        count, kind = adapter_parameters(config.model, config.adapter), "PEFT adapter"
    say(f"{parameters(count)} parameters written as {kind} {written} in {seconds:.1f} s")
    if verify and config.adapter is not None and not config.model.value_head:
        say(verify_adapters(source, written))
    elif verify and config.model.value_head:
        say("not compared with transformers: the model gives texts a value, and no logits over the vocabulary")
    elif verify:
        folder, checkpoint = (written, Path(source)) if to_hf else (Path(source), written)
        say(verified(folder, checkpoint, rounded=wanted is not None))
    return written


def parameters(count: int) -> str:
    """A number of parameters in millions, or in thousands if it is smaller."""
    return f"{count / 1e6:,.1f} M" if count >= 10**6 else f"{count / 1e3:,.1f} k"
