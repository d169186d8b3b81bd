"""A real server process and real clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.served import RunningServer, running_server, served_folder

openai = pytest.importorskip("openai")
MESSAGES: Any = [{"role": "user", "content": "What is json for?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = served_folder(tmp_path_factory.mktemp("served") / "small")
    with running_server(folder, ["--max-running", "8", "--max-queue", "16", "--cache-tokens", "2048"]) as running:
        yield running
        assert running.end() == 0, running.log
        assert "Traceback" not in running.log and "error:" not in running.log


@pytest.fixture
def client(server: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", timeout=60, max_retries=0)


def test_a_streamed_answer_is_the_whole_one(client: Any) -> None:
    settings = {"model": "small", "messages": MESSAGES, "max_tokens": 20, "seed": 7, "n": 2, "temperature": 0.8}
    whole = client.chat.completions.create(**settings)
    assert [choice.index for choice in whole.choices] == [0, 1]
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and usage.completion_tokens == 40


def test_a_model_that_is_not_there(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.NotFoundError, match='"other"'):
        client.completions.create(model="other", prompt="x")
