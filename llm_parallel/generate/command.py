"""``llm-parallel generate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.template import Refused
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.decode import Structured, generate
from llm_parallel.generate.engine import Generator
from llm_parallel.generate.held import AS_SAVED, Held
from llm_parallel.generate.load import Loaded, Member, load_model
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.generate.requests import Reason, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.structure import Structure
from llm_parallel.lines import note
from llm_parallel.parallel.groups import close_groups
from llm_parallel.printable import Pieces, printable


def _json_files(folders: Sequence[Path], *names: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that lie beside a model's weights or its tokenizer."""
    for folder in folders:
        for name in names:
            with suppress(OSError, ValueError):
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                if isinstance(found, dict):
                    yield found


def prompt_prefix(tokenizer: Tokenizer, folders: Sequence[Path]) -> list[int]:
    """Tokens that the model expects before a prompt: those of the template in ``tokenizer.json``, or the begin token if
    ``tokenizer_config.json`` says ``add_bos_token``. Models trained here expect none."""
    template: list[int] = getattr(tokenizer, "prefix", [])
    if template or tokenizer.bos is None:
        return template
    wanted = any(found.get("add_bos_token") for found in _json_files(folders, "tokenizer_config.json"))
    return [tokenizer.bos] if wanted else []


def end_tokens(tokenizer: Tokenizer, folders: Sequence[Path]) -> set[int]:
    """Tokens that end an answer: the tokenizer's end token, and all that the model's files name."""
    ends = {tokenizer.eod}
    for found in _json_files(folders, "generation_config.json", "config.json"):
        named = found.get("eos_token_id")
        ends |= {number for number in (named if isinstance(named, list) else [named]) if isinstance(number, int)}
    return ends


def chat_prompts(encoder: ChatEncoder, questions: Sequence[str], system: str | None = None) -> list[list[int]]:
    """Tokens of each question as a user's message, up to where the assistant answers; before it the system message, if
    there is one. Raises UserError if the template refuses one."""
    first = [{"role": "system", "content": system}] if system else []
    try:
        return [encoder.prompt([*first, {"role": "user", "content": text}]).tolist() for text in questions]
    except Refused as error:
        raise UserError(f"the chat template refuses the prompt: {error}") from None


def _print_answers(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Each prompt and its answer, told apart if there are several. A terminal gets no control character of them: a
    model writes what strangers' texts taught it."""
    shown = printable if sys.stdout.isatty() else str
    for number, (prompt, text) in enumerate(zip(prompts, texts), 1):
        if len(prompts) > 1:
            print(f"{'' if number == 1 else chr(10)}--- prompt {number} of {len(prompts)} ---")
        print(shown(prompt + text))


def open_model(
    checkpoint: str | Path, held: Held, member: Member | None = None
) -> tuple[Loaded, Tokenizer, list[Path]]:
    """The model, or this process's part of it, its tokenizer, and the folders whose files say how texts begin and
    end. Raises UserError."""
    loaded = load_model(checkpoint, held.device, weights=held.weights, deterministic=held.deterministic, member=member)
    return loaded, *tokenizer_of(checkpoint, loaded.config, loaded.tokenizer)


def tokenizer_of(
    checkpoint: str | Path, config: RunConfig, opened: Tokenizer | None = None
) -> tuple[Tokenizer, list[Path]]:
    """The tokenizer of a model, and the folders whose files say how texts begin and end. Raises UserError."""
    if opened is None and config.data.tokenizer:
        opened = load_tokenizer(config.data.tokenizer)
    if opened is None:
        raise UserError(
            f"{checkpoint} has no tokenizer beside its weights; put a tokenizer.json or tokenizer.model there"
        )
    beside = Path(config.data.tokenizer or checkpoint)
    return opened, [Path(checkpoint), beside if beside.is_dir() else beside.parent]


def sampling_of(request: GenerateRequest) -> Sampling:
    """How tokens are drawn. Raises UserError for a value out of range."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "min_p", "top_log_probs")
    penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    return Sampling(**{name: getattr(request, name) for name in (*names, *penalties)})


def structure_of(request: GenerateRequest) -> Structure | None:
    """The form that answers must have. Raises UserError for a file that cannot be read, or what is no such form."""
    if request.regex is not None:
        return Structure.regex(request.regex)
    if request.choice:
        return Structure.choice(request.choice)
    for name, make in (("json_schema", Structure.json_schema), ("grammar", Structure.grammar)):
        path = getattr(request, name)
        if path is not None:
            try:
                return make(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise UserError(f"--{name.replace('_', '-')} {path} cannot be read: {reason}") from None
    return None


def _say_unfinished(structured: Structured, sampling: Sampling) -> None:
    for number, reason in sorted(structured.unfinished.items()):
        why = (
            f"at --max-new-tokens {sampling.max_new_tokens}; give more"
            if reason is Reason.LENGTH
            else "because no token of the vocabulary continues it"
        )
        note(f"[the answer to prompt {number + 1} ended before its structure was complete, {why}]")


def _write_best(
    generator: Generator, requests: Sequence[Request], answers: Sequence[Answer], structured: Structured | None
) -> None:
    """Fills answers with the best to each request."""
    for finished in generator.run(requests):
        ended = finished.tokens and finished.tokens[-1] in requests[finished.number].ends
        for token in finished.tokens[:-1] if ended else finished.tokens:
            answers[finished.number].add(token)
        if structured is not None and finished.truncated:
            structured.unfinished[finished.number] = finished.reason


def prompts_command(request: GenerateRequest) -> list[str]:
    """Answers the prompts of a request; see ``generate_command``."""
    return generate_command(
        request.checkpoint,
        request.prompts,
        sampling_of(request),
        held=request.held(),
        stop=request.stop,
        chat=request.chat,
        structure=structure_of(request),
        best_of=request.best_of or 1,
    )


def generate_command(
    checkpoint: str,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    held: Held = AS_SAVED,
    stop: Sequence[str] = (),
    chat: bool = False,
    structure: Structure | None = None,
    best_of: int = 1,
) -> list[str]:
    """Prints each prompt and its continuation, up to the first of the texts ``stop`` in it; token by token if there is
    one prompt and a terminal. ``chat``: prompts are a user's messages, and answers stand on a line of their own.
    ``structure``: the form that answers must have. ``best_of``: as in ``Request``; nothing is shown before the end.

    Returns the new texts. Raises UserError if there is no model, no tokenizer, or a value is out of range."""
    loaded, tokenizer, folders = open_model(checkpoint, held)
    begin, ends = prompt_prefix(tokenizer, folders), end_tokens(tokenizer, folders)
    if chat:
        encoder = open_encoder(loaded.config)
        begin, ends = [], ends | set(encoder.stops)
        encoded = chat_prompts(encoder, prompts, loaded.config.chat.system)
        prompts = [prompt + "\n" for prompt in prompts]
    else:
        encoded = [[int(token) for token in tokenizer.encode(prompt)] for prompt in prompts]
    answers = [Answer(tokenizer, tokens, stop) for tokens in encoded]
    streaming = len(prompts) == 1 and best_of == 1 and sys.stdout.isatty()
    shown, pieces = 0, Pieces()

    def take(number: int, token: int) -> bool:
        nonlocal shown
        ended = answers[number].add(token)
        if streaming and len(text := answers[number].certain()) > shown:
            print(pieces.take(text[shown:]), end="", flush=True)
            shown = len(text)
        return ended

    if streaming:
        print(printable(prompts[0]), end="", flush=True)
    started = time.perf_counter()
    structured = Structured(structure, tokenizer) if structure else None
    inputs = [[*begin, *tokens] for tokens in encoded]
    if best_of == 1:
        generate(loaded.network, inputs, sampling, ends, take, structured)
    else:
        asked: dict[str, Any] = {"structure": structure, "best_of": best_of}
        asked |= {"ends": frozenset(ends), "stop": tuple(stop)}
        requests = [Request(number, tuple(tokens), sampling, **asked) for number, tokens in enumerate(inputs)]
        _write_best(Generator(loaded.network, tokenizer=tokenizer), requests, answers, structured)
    seconds = time.perf_counter() - started
    texts = [answer.text() for answer in answers]
    if streaming:
        print(pieces.take(texts[0][shown:]) + pieces.end())
    else:
        _print_answers(prompts, texts)
    if structured is not None:
        _say_unfinished(structured, sampling)
    count = sum(len(answer.tokens) for answer in answers)
    where = loaded.models[0].groups.platform.device_name
    print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s on {where}]", file=sys.stderr)
    close_groups()
    return texts
