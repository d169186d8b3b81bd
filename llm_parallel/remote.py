"""What everything that speaks to a server with OpenAI's interface shares: its address, the key, and how it fails."""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from llm_parallel.errors import UserError
from llm_parallel.printable import printable

MAX_ERROR_BYTES = 1 << 16


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Python's own handler sends the API key to wherever a redirect points."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Raises UserError."""
        raise UserError(f"{printable(req.full_url)} sends on to {printable(newurl)}; give that address instead")


def base_of(address: str, key_name: str) -> str:
    """The address up to ``/v1``. Raises UserError if it is none, or holds a user name; ``key_name`` is the environment
    variable where a key belongs."""
    try:
        parts = urlsplit(address)
        fine = bool(parts.hostname) and (parts.port or 1) > 0 and not parts.query and not parts.fragment
        fine = fine and parts.scheme in ("http", "https")
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"{address} is no address of a server; give one such as http://127.0.0.1:8000")
    if parts.username is not None:
        raise UserError(f"the address has a user name in it; set an API key in {key_name} instead")
    base = address.rstrip("/")
    for ending in ("/chat/completions", "/models"):
        base = base.removesuffix(ending)
    return base if base.endswith("/v1") or parts.path.strip("/") else base + "/v1"


def key_of(environment: Mapping[str, str], name: str) -> str | None:
    """The API key in the environment variable ``name``. Raises UserError if it can be none."""
    key = environment.get(name, "").strip()
    if not all("!" <= letter <= "~" for letter in key):  # http.client's own error would show the key
        raise UserError(f"the API key in {name} has a space or another character that no key has; set it again")
    return key or None


def is_loopback(base: str) -> bool:
    """Whether an address is this machine."""
    host = urlsplit(base).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def is_private(base: str) -> bool:
    """Whether nobody on the way can read what is sent."""
    return base.startswith("https://") or is_loopback(base)


def opener(base: str) -> urllib.request.OpenerDirector:
    """Opens requests. Proxies of the environment are used, but not for this machine itself."""
    handlers: list[Any] = [NoRedirects()]
    if is_loopback(base):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def reason(error: Exception) -> str:
    """Why a server cannot be reached, in words."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(inner, socket.gaierror):
        return "there is no host of that name"
    if isinstance(inner, TimeoutError):
        return "it does not answer"
    return printable(str(inner)) or type(inner).__name__


def refusal(error: urllib.error.HTTPError) -> tuple[str, str]:
    """What a server says with a status that is no success, and its code and type of error."""
    said, code = "", ""
    with suppress(ValueError, OSError, AttributeError, http.client.HTTPException):
        found = json.loads(error.read(MAX_ERROR_BYTES))
        inner = found.get("error", found.get("detail", found.get("message")))
        said = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner or "")
        code = f"{inner.get('code')} {inner.get('type')}" if isinstance(inner, dict) else ""
    return said, code
