"""``llm-parallel generate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.generate.decode import generate
from llm_parallel.generate.load import load_model
from llm_parallel.generate.sampling import Sampling
from llm_parallel.parallel.groups import close_groups


def begins_with_bos(folder: str) -> bool:
    """Whether the model in ``folder`` was trained on texts that begin with the begin token, as its
    ``tokenizer_config.json`` tells; ours are not."""
    try:
        return bool(json.loads((Path(folder) / "tokenizer_config.json").read_text()).get("add_bos_token"))
    except (OSError, ValueError):
        return False


def generate_command(
    checkpoint: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> list[str]:
    """Prints each prompt and what the model writes on, as it comes if there is one prompt and a terminal.

    Returns the new texts. Raises UserError if there is no model, no tokenizer, or a value is out of range."""
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    loaded = load_model(checkpoint, device)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{checkpoint} has no tokenizer beside its weights; put a tokenizer.json or tokenizer.model there"
        )
    begin = [tokenizer.bos] if tokenizer.bos is not None and begins_with_bos(checkpoint) else []
    numbers = [[*begin, *map(int, tokenizer.encode(prompt))] for prompt in prompts]
    streaming = len(prompts) == 1 and sys.stdout.isatty()
    written: list[int] = []
    shown = ""

    def show(_: int, token: int) -> None:
        nonlocal shown
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # half of a character; the next token brings the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text

    if streaming:
        print(prompts[0], end="", flush=True)
    started = time.perf_counter()
    answers = generate(loaded.models, numbers, sampling, tokenizer.eod, show if streaming else None)
    seconds = time.perf_counter() - started
    texts = [tokenizer.decode(answer) for answer in answers]
    if streaming:
        print()
    else:
        for prompt, text in zip(prompts, texts):
            print(prompt + text)
    count = sum(map(len, answers))
    where = loaded.models[0].groups.platform.device_name
    print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s on {where}]", file=sys.stderr)
    close_groups()
    return texts
