"""A small random model with a tokenizer and a chat template, and a real server process over it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.commands import COMMAND, environment

CONTEXT = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def served_folder(folder: Path, seed: int = 0, context: int = CONTEXT, hidden: int = 32, layers: int = 2) -> Path:
    """A Hugging Face folder of a random Llama with a byte-level tokenizer, which knows every text. Its end tokens are
    as likely as all others, about one in 260."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {name: number for number, name in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    declared = {"eos_token": SPECIAL[0], "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(letters),
        max_position_embeddings=context,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class RunningServer:
    """A server process. base: its address; lines: what it has written, both streams together; folder: its
    model."""

    process: subprocess.Popen[str]
    base: str
    lines: list[str]
    folder: Path

    @property
    def log(self) -> str:
        """Everything that it has written."""
        return "".join(self.lines)

    def end(self, timeout_s: float = 60.0) -> int:
        """Asks it to end and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def running_server(
    folder: Path, arguments: Sequence[str] = (), env: dict[str, str] | None = None, timeout_s: float = 120.0
) -> Iterator[RunningServer]:
    """``llm-parallel serve FOLDER`` on a free port of this machine."""
    process = subprocess.Popen(
        [*COMMAND, "serve", str(folder), "--port", "0", "--device", "cpu", *arguments],
        env=environment({"PYTHONUNBUFFERED": "1", **(env or {})}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        until = time.monotonic() + timeout_s
        while (found := re.search(r"served at (http\S+)/v1", "".join(lines))) is None:
            assert process.poll() is None and time.monotonic() < until, "".join(lines)
            time.sleep(0.05)
        yield RunningServer(process, found[1], lines, folder)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5.0)


if __name__ == "__main__":
    print(served_folder(Path(sys.argv[1])), os.getpid())
