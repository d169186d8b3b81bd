"""What stands before the server: its options, its keys, who may ask, and fields of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_parallel.errors import UserError
from llm_parallel.serve.command import model_name, read_keys
from llm_parallel.serve.errors import ApiError
from llm_parallel.serve.fields import Fields
from llm_parallel.serve.guard import LOOPBACK_NAMES, Access, digests
from llm_parallel.serve.listen import listen
from llm_parallel.serve.models import Names
from llm_parallel.serve.request import ServeRequest


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 70000}, "--port is 70000"),
        ({"max_queue": -1}, "--max-queue is -1"),
        ({"tp": 0}, "--tp is 0"),
        ({"reload_s": 0.0}, "--reload-s is 0.0"),
        ({"reload_s": 1.0, "adapter": ("a=b",)}, "--reload-s and --adapter"),
        ({"adapter": ("folder",)}, "give NAME=FOLDER"),
        ({"adapter": ("a=b", "a=c")}, "'a' twice"),
        ({"finish_s": -1.0}, "--finish-s is -1.0"),
    ],
    ids=str,
)
def test_options_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ServeRequest("runs/first", **given)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# a comment\n\n one \ntwo\n")
    assert read_keys(path, "three, four,") == ["three", "four", "one", "two"] and read_keys(None, "") == []
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(path, "")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none", "")


def test_a_port_in_use_is_said() -> None:
    first = listen("127.0.0.1", 0)
    first.listen()
    with pytest.raises(UserError, match="cannot be listened on"):
        listen("127.0.0.1", first.getsockname()[1])
    first.close()
    with pytest.raises(UserError, match="--host"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/first", "first"), ("runs/a/checkpoints/iter_0000100", "a"), ("runs/a/checkpoints", "a"), ("/", "model")],
)
def test_a_model_is_named_by_its_run(path: str, name: str) -> None:
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {"host": "localhost:8000", "authorization": "Bearer right"}, None),
        ("/v1/models", {"host": "[::1]:8000", "authorization": "bearer right"}, None),
        ("/v1/models", {"host": "localhost:8000"}, 401),
        ("/v1/models", {"host": "localhost:8000", "authorization": "Bearer wrong"}, 401),
        ("/v1/models", {"host": "localhost:8000", "authorization": "Basic right"}, 401),
        ("/health", {"host": "localhost:8000"}, None),
        ("/health", {"host": "rebound.example"}, 403),
        ("/health", {}, 403),
        ("/health", {"host": "[bad"}, 403),
        ("/health", {"host": "localhost:8000", "origin": "http://localhost:8000"}, None),
        ("/health", {"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ("/health", {"host": "localhost:8000", "origin": "null"}, 403),
        ("/health", {"host": "localhost:8000", "origin": "https://chat.example"}, None),
    ],
)
def test_who_may_ask(path: str, headers: dict[str, str], status: int | None) -> None:
    datastructures = pytest.importorskip("starlette.datastructures")
    access = Access(digests(["other", "right"]), LOOPBACK_NAMES, ("https://chat.example",))
    if status is None:
        access.check(path, datastructures.Headers(headers))
        return
    with pytest.raises(ApiError) as refused:
        access.check(path, datastructures.Headers(headers))
    assert refused.value.status == status


def test_null_is_not_given_and_unasked_fields_are_unknown() -> None:
    fields = Fields({"n": None, "seed": 3.0, "flag": True, "odd": 1, "user": "x"})
    assert fields.whole("n", 7, 1, 9) == 7 and fields.whole("seed", 0, 0, 9) == 3 and fields.flag("flag")
    assert fields.unknown(("user",)) == ["odd"]
    with pytest.raises(ApiError, match="flag is true; it must be a number"):
        fields.number("flag", 0.0, 0.0, 1.0)


class Words:
    """Names of tokens in a SentencePiece vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [0]

    def token(self, number: int) -> str:
        return ["\u2581the", "<0xE2>", "<unk>"][number]


def test_tokens_have_their_text_and_bytes() -> None:
    names = Names(Words())  # type: ignore[arg-type]
    assert names.of(0) == (" the", list(b" the")) and names.of(1) == ("\ufffd", [0xE2]) and names.of(2)[0] == "<unk>"
