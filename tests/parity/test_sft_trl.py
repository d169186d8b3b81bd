"""Fine-tuning beside TRL's SFTTrainer: the same conversations in each step, losses and weights step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm_parallel.jsonlines import read_jsonlines
from tests.support import four_digits
from tests.support.commands import train_in_ranks
from tests.support.harness import run_ranks

COUNT, STEPS, RATE = 12, 4, 2e-3
EPSILON = 1e-4
"""Larger than usual, so that a gradient of nearly 0 makes no whole step of either sign."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


NAMES = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens", "epoch")
"""What TRL logs of a step."""


def trained_by_trl(rank: int, world_size: int, folder: str) -> list[dict[str, float]]:
    """What TRL's trainer logs on all conversations in each step; writes the weights before and after."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, eos_token_id=four_digits.END, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(f"{folder}/before")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/before")
    tokenizer.pad_token = "+"
    arguments = SFTConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=COUNT, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=EPSILON,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, assistant_only_loss=True,
        packing=False, gradient_checkpointing=False, max_length=None, dataloader_pin_memory=False,
    )  # fmt: skip
    data = load_dataset("json", data_files=f"{folder}/train.jsonl", split="train", cache_dir=f"{folder}/cache")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.model.save_pretrained(f"{folder}/trl-after")
    return [record for record in trainer.state.log_history if "loss" in record]


def exported_difference(rank: int, world_size: int, run_dir: str, folder: str) -> float:
    """Largest difference of a weight of our run from TRL's."""
    from safetensors.torch import load_file

    from llm_parallel.convert.export import export_to_hf

    ours = load_file(export_to_hf(run_dir, f"{run_dir}-hf") / "model.safetensors")
    theirs = load_file(f"{folder}/trl-after/model.safetensors")
    assert set(ours) == set(theirs)
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


@pytest.mark.gloo
def test_metrics_and_weights_are_those_of_trl(tmp_path: Path) -> None:
    folder = four_digits.write_tokenizer(tmp_path / "before")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    four_digits.write_conversations(tmp_path / "train.jsonl", COUNT)
    wanted = run_ranks(trained_by_trl, 1, str(tmp_path))[0]
    tree: dict[str, Any] = {
        "device": "cpu",
        "method": {"kind": "sft"},
        "chat": {"train": [str(tmp_path / "train.jsonl")], "eval_fraction": 0.0, "packing": "pad"},
        "data": {"seq_length_tokens": 24},
        "checkpoint": {"load": str(folder)},
        "train": {"global_batch_size": COUNT, "steps": STEPS, "threads_per_process": 1},
        "optim": {"lr": RATE, "schedule": "constant", "weight_decay": 0.0, "epsilon": EPSILON},
        "log": {"tensorboard": False, "plots": False},
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    layouts = {
        "alone": (1, ["train.micro_batch_size=12"]),
        "tp2pp2": (4, ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=3"]),
        "packed": (2, ["parallel.cp=2", "chat.packing=best_fit", "data.seq_length_tokens=204",
                       "train.global_batch_size=1"]),
    }  # fmt: skip
    for name, (processes, overrides) in layouts.items():
        run_dir = tmp_path / name
        train_in_ranks(run_file, processes, f"run_dir={run_dir}", *overrides)
        found = [record for record in read_jsonlines(run_dir / "metrics.jsonl") if "train/loss" in record]
        assert len(found) == len(wanted) == STEPS
        for ours, theirs in zip(found, wanted):
            for metric in NAMES:
                assert ours[f"train/{metric}"] == pytest.approx(theirs[metric], rel=1e-5), (name, metric)
        assert run_ranks(exported_difference, 1, str(run_dir), str(tmp_path))[0] < 2e-6, name
