"""Fine-tuning on conversations, ours against TRL's SFTTrainer with PEFT: packed (best fit) and padded, full and LoRA.
Both train one epoch of the same conversations, on the same weights, in turns of one step in one process on one thread;
what counts is tokens that are not padding, a processor-second.

    python benchmarks/packing.py --out benchmarks/results/packing_cpu.json
    python benchmarks/packing.py --base ~/.cache/llm-parallel-tests/smollm2-135m --tokens 1500 --out FILE

A step is the whole step of either trainer: batch, forward, backward, clipping, AdamW and metrics. Padded samples of
either are as long as the longest of the micro batch.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured_on import measured_on
from llm_parallel.parallel.cpu_products import as_torch_multiplies

MODULES = "json re os shutil random statistics textwrap difflib heapq bisect glob fnmatch csv string logging zipfile"
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
LENGTH, ROWS, LR, RANK, VOCABULARY = 256, 4, 2e-4, 8, 8192
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations() -> list[list[dict[str, str]]]:
    """A question about each documented function and method of some modules of Python, and its documentation."""
    found = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        things = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == name]
        methods = [method for thing in things if inspect.isclass(thing) for method in vars(thing).values()]
        for thing in (*things, *methods):
            text = inspect.getdoc(thing) if callable(thing) else None
            if text and getattr(thing, "__qualname__", None):
                question = f"What does {name}.{thing.__qualname__} do?"
                found.append([{"role": "user", "content": question}, {"role": "assistant", "content": text}])
    random.Random(0).shuffle(found)
    return found


def write_model(folder: Path, texts: list[str]) -> None:
    """A 17 M parameter Llama with random weights, and a tokenizer for the texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator(texts, VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_conversations(folder: Path, path: Path, tokens: int) -> int:
    """As many conversations as have that many tokens, none longer than a sample; returns their tokens."""
    from transformers import AutoTokenizer

    tokenizer, total, rows = AutoTokenizer.from_pretrained(folder), 0, []
    for messages in conversations():
        count = len(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"])
        if count < LENGTH and total < tokens:
            total += count
            rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows) + "\n")
    return total


def our_steps(folder: Path, base: Path, packed: bool, lora: bool) -> Iterator[None]:
    """Our training run of one epoch, step by step."""
    from llm_parallel.config.load import load_config
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.train.loop import train_step
    from llm_parallel.train.open import open_run
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.train.watch import Watch
    from llm_parallel.tune.methods import method_of

    size = 1 if packed else ROWS
    tree: dict[str, Any] = {
        "run_dir": str(folder / "ours"),
        "device": "cpu",
        "method": {"kind": "sft"},
        "chat": {"train": [str(folder / "train.jsonl")], "eval_fraction": 0.0, "show_answers": 0},
        "data": {"seq_length_tokens": LENGTH},
        "checkpoint": {"load": str(base)},
        "train": {"global_batch_size": size, "micro_batch_size": size, "epochs": 1, "threads_per_process": 1},
        "optim": {"lr": LR, "schedule": "constant", "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False, "interval_steps": 1000},
    }
    tree["chat"]["packing"] = "best_fit" if packed else "pad"
    if lora:
        tree["adapter"] = {"rank": RANK, "alpha": 2 * RANK}
    shutil.rmtree(folder / "ours", ignore_errors=True)
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    config = preflight(load_config(str(run_file), notice=lambda _: None), 1)
    run = open_run(config, Place(0, 1, 0), lambda: False, Watch(), method_of(config))
    try:
        yield
        while not run.state.finished(config.train.steps):
            train_step(run, Watch())
            yield
    finally:
        run.feed.close()
        run.metrics.close()
        close_groups()


def their_steps(folder: Path, base: Path, packed: bool, lora: bool) -> Iterator[None]:
    """The steps that SFTTrainer's loop makes of one epoch."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    size = 1 if packed else ROWS
    arguments = SFTConfig(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=size, num_train_epochs=1, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, assistant_only_loss=True, packing=packed, packing_strategy="bfd", max_length=LENGTH,
        gradient_checkpointing=False, dataloader_pin_memory=False, optim="adamw_torch_fused", disable_tqdm=True,
    )  # fmt: skip
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=settings if lora else None,
    )
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    yield
    for inputs in trainer.get_train_dataloader():
        count = (inputs["labels"] != -100).sum()
        trainer.training_step(model, inputs, num_items_in_batch=count)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.zero_grad()
        yield


def in_turns(contenders: dict[str, Iterator[None]]) -> tuple[dict[str, float], dict[str, int]]:
    """Processor-seconds and steps of both epochs, without what comes before a first step."""
    for steps in contenders.values():
        next(steps)
    seconds, made = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0)
    step: dict[str, Callable[[], Any]] = {
        name: lambda steps=steps: next(steps, "end") for name, steps in contenders.items()
    }
    step["theirs"] = as_torch_multiplies()(step["theirs"])
    going = list(contenders)
    while going:
        for name in tuple(going):
            began = time.process_time()
            over = step[name]() == "end"
            seconds[name] += time.process_time() - began
            made[name] += not over
            if over:
                going.remove(name)
    return seconds, made


def main() -> None:
    """Measures, and writes what was measured with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="Hugging Face folder to take instead of the 17 M parameter model")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of an epoch")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        if asked.base is None:
            write_model(base, [message["content"] for messages in conversations() for message in messages])
        else:
            shutil.copytree(asked.base.expanduser(), base)
        (base / "chat_template.jinja").write_text(TEMPLATE)
        tokens = write_conversations(base, folder / "train.jsonl", asked.tokens)
        for lora in (False, True):
            for packed in (True, False):
                how = (folder, base, packed, lora)
                seconds, steps = in_turns({"ours": our_steps(*how), "theirs": their_steps(*how)})
                rates = {name: tokens / taken for name, taken in seconds.items()}
                row = {"kind": "LoRA" if lora else "full", "batch": "packed" if packed else "padded", "steps": steps}
                rows.append({**row, "tokens_per_processor_s": rates, "ratio": rates["ours"] / rates["theirs"]})
                print(
                    f"{row['kind']}, {row['batch']}: ours {rates['ours']:,.0f}, theirs {rates['theirs']:,.0f} tokens a "
                    f"processor-second, ratio {rows[-1]['ratio']:.2f}; steps {steps['ours']} and {steps['theirs']}",
                    flush=True,
                )
    if asked.out:
        about = {**measured_on("trl", "peft"), "threads": 1, "tokens": tokens}
        asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
