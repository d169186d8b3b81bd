"""``llm-parallel convert``: Hugging Face folders ↔ our checkpoints; adapters → PEFT folders or merged models."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from llm_parallel.convert.adapters import export_merged, export_to_peft
from llm_parallel.convert.export import export_to_hf
from llm_parallel.convert.importing import import_from_hf
from llm_parallel.errors import UserError
from llm_parallel.generate.forward import pipeline_logits
from llm_parallel.generate.load import describe_folder, load_model
from llm_parallel.model.flops import adapter_parameters, parameter_count
from llm_parallel.model.hf import is_hf_folder
from llm_parallel.model.peft_files import is_peft_folder
from llm_parallel.parallel.groups import close_groups

PROBE_TOKENS = 64


def convert_command(
    source: str, target: str, *, verify: bool = True, max_shard_gb: float = 5.0, merge: bool = False
) -> Path:
    """Converts in the direction that follows from the kind of ``source``, prints what was done and the largest logit
    difference between the two folders, and returns the folder written. Adapters become a PEFT folder, or with ``merge``
    are added to the model under them. Raises UserError as the directions do."""
    if max_shard_gb <= 0:
        raise UserError(f"max_shard_gb is {max_shard_gb}; it must be over 0")
    config = describe_folder(source)
    if merge and config.adapter is None:
        raise UserError(f"{source} holds no adapters that could be merged; leave --merge out")
    if is_peft_folder(source) and not merge:
        raise UserError(
            f"{source} is a PEFT adapter; begin a run from it by adapter.load, or merge it into its model by --merge"
        )
    count = parameter_count(config.model).total
    to_hf = not is_hf_folder(source)
    started = time.perf_counter()
    if config.adapter is not None:
        written = export_merged(source, target, int(max_shard_gb * 1e9)) if merge else export_to_peft(source, target)
    elif to_hf:
        written = export_to_hf(source, target, int(max_shard_gb * 1e9))
    else:
        written = import_from_hf(source, target, config)
    seconds = time.perf_counter() - started
    kind = "Hugging Face folder" if to_hf else "checkpoint"
    if config.adapter is not None and not merge:
        count, kind = adapter_parameters(config.model, config.adapter), "PEFT adapter"
    print(f"{count / 1e6:,.1f} M parameters written as {kind} {written} in {seconds:.1f} s")
    if verify:
        difference = largest_logit_difference(source, written)
        print(
            f"largest logit difference between {source} and {written}: {difference:.2e} (fp32, {PROBE_TOKENS} tokens)"
        )
    return written


def largest_logit_difference(one: str | Path, other: str | Path) -> float:
    """Largest absolute difference of the logits that our model gives with the weights of two folders, in fp32 on the
    CPU over ``PROBE_TOKENS`` fixed random tokens. One model at a time is in memory."""
    found = []
    for folder in (one, other):
        loaded = load_model(folder, "cpu", "fp32")
        length = min(PROBE_TOKENS, loaded.config.model.max_seq_length_tokens)
        tokens = torch.randint(
            0, loaded.config.model.vocab_size or 1, (1, length), generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            found.append(pipeline_logits(loaded.models, tokens))
        close_groups()
    assert found[0] is not None and found[1] is not None
    return (found[0] - found[1]).abs().max().item()
