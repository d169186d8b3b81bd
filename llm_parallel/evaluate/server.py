"""A model behind an address with OpenAI's interface, by lm-eval's own back ends for such servers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError

TIMEOUT_S = 30.0
AT_ONCE = 8
"""Requests that a server gets at the same time."""
CONTEXT = 2048
"""Tokens of a server's context where it does not say."""


def base_of(address: str) -> str:
    """The address up to and with its version: ``http://host:8000/v1``."""
    address = address.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        address = address.removesuffix(ending)
    return address if address.rsplit("/", 1)[-1].startswith("v") else f"{address}/v1"


def models_of(base: str, key: str) -> list[dict[str, Any]]:
    """What a server says about its models. Raises UserError if it does not answer as OpenAI's interface does."""
    request = urllib.request.Request(f"{base}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found = json.load(answer)["data"]
            return [one for one in found if isinstance(one.get("id"), str)]
    except urllib.error.HTTPError as error:
        hint = "; set OPENAI_API_KEY" if error.code in (401, 403) else ""
        raise UserError(f"{base}/models answers with status {error.code}{hint}") from None
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{base} cannot be reached: {reason}; start the server, or give its address") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{base}/models does not answer as OpenAI's interface does; give the address of such a server"
        ) from None


def served(base: str, key: str, wanted: str | None) -> dict[str, Any]:
    """The model of a server by its name, or its first. Raises UserError."""
    found = models_of(base, key)
    names = [one["id"] for one in found]
    if not names:
        raise UserError(f"{base} serves no model")
    if wanted is not None and wanted not in names:
        raise UserError(f"--served-name is {wanted!r}, and {base} serves {', '.join(names)}")
    return found[names.index(wanted) if wanted is not None else 0]


def server_lm(base: str, model: dict[str, Any], chat: bool, tokenizer: Path | None) -> Any:
    """lm-eval's back end for a server. Log-likelihoods need the model's tokenizer, to know where a text is divided."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    context = next((int(model[key]) for key in ("max_model_len", "context_length") if model.get(key)), CONTEXT)
    common = {"model": model["id"], "num_concurrent": AT_ONCE, "max_length": context, "max_retries": 3}
    if chat:
        return LocalChatCompletion(base_url=f"{base}/chat/completions", **common)
    backend = None if tokenizer is None else "huggingface"
    named = None if tokenizer is None else str(tokenizer)
    address = f"{base}/completions"
    return LocalCompletionsAPI(base_url=address, tokenizer_backend=backend, tokenizer=named, **common)


def check_tasks(names: dict[str, str], chat: bool, tokenizer: Path | None) -> None:
    """Whether a server can be asked for all of these tasks, given with their kinds of output. Raises UserError."""
    scored = [name for name, kind in names.items() if kind != "generate_until"]
    if scored and chat:
        raise UserError(
            f"{scored[0]} needs log-probabilities of given texts, which chat completions do not have; leave --chat or "
            "that task out"
        )
    if scored and tokenizer is None:
        raise UserError(
            f"{scored[0]} needs log-probabilities of given texts; give the folder of the model's tokenizer as "
            "--tokenizer, or leave that task out"
        )
