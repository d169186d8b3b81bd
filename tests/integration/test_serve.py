"""A real server process and real clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.malformed import CHAT, MALFORMED, MESSAGES, TEXT, TEXTS
from tests.support.served import CONTEXT, RunningServer, running_server, served_folder

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = served_folder(tmp_path_factory.mktemp("served") / "small")
    limits = ["--max-running", "8", "--max-queue", "16", "--cache-tokens", "4096", "--max-request-mb", "0.1"]
    with running_server(folder, limits) as running:
        yield running
        assert running.end() == 0, running.log
        assert "Traceback" not in running.log and "error:" not in running.log, running.log


@pytest.fixture
def client(server: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", timeout=60, max_retries=0)


def gauge(server: RunningServer, name: str) -> float:
    page = httpx.get(f"{server.base}/metrics").text
    return sum(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"llm_parallel_{name}"))


def wait_until_idle(server: RunningServer) -> None:
    until = time.monotonic() + 30
    while gauge(server, "queue") + gauge(server, "running") and time.monotonic() < until:
        time.sleep(0.02)


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


def test_chunks_have_the_form_that_clients_read(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "seed": 1, "stream": True, "logprobs": True, "top_logprobs": 2}
    with httpx.stream("POST", server.base + CHAT, json={**body, "stream_options": {"include_usage": True}}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == chunks[-1]["usage"]["prompt_tokens"] + 3
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    entries = [
        one for c in chunks[:-1] if c["choices"][0]["logprobs"] for one in c["choices"][0]["logprobs"]["content"]
    ]
    assert len(entries) == 3 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_prompts_in_all_forms_with_their_scores_as_by_transformers(client: Any, server: RunningServer) -> None:
    text = "To be or not"
    tokens = [3 + sorted(_letters()).index(letter) for letter in text.replace(" ", "\u0120")]
    asked = {"model": "small", "max_tokens": 0, "echo": True, "logprobs": 2}
    (one,) = client.completions.create(prompt=text, **asked).choices
    several = client.completions.create(prompt=[tokens, tokens[:2]], **asked).choices
    assert one.text == text == several[0].text and several[1].text == text[:2] and several[1].index == 1
    assert one.logprobs.token_logprobs[0] is None and one.logprobs.text_offset == list(range(len(text)))
    assert one.logprobs.token_logprobs[1:] == pytest.approx(_log_probs(server, tokens), abs=2e-5)
    assert [max(top, key=top.get) for top in one.logprobs.top_logprobs[1:]] == [
        max(top, key=top.get) for top in several[0].logprobs.top_logprobs[1:]
    ]
    written = client.completions.create(prompt=tokens, model="small", max_tokens=5, temperature=0, echo=True)
    assert written.choices[0].text.startswith(text) and written.usage.completion_tokens == 5
    best = client.completions.create(prompt=text, model="small", max_tokens=5, best_of=6, n=2, seed=3, logprobs=0)
    assert len(best.choices) == 2 and best.usage.completion_tokens == 30
    sums = [sum(choice.logprobs.token_logprobs) for choice in best.choices]
    assert sums[0] >= sums[1]


def _letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def _log_probs(server: RunningServer, tokens: list[int]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(server.folder).double()
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return [float(row[token]) for row, token in zip(log_probs, tokens[1:])]


def test_embeddings_are_the_mean_of_hidden_states(client: Any, server: RunningServer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = [[5, 6, 7, 8], [9] * 40]
    found = client.embeddings.create(model="small", input=tokens)  # which asks for base64
    model = AutoModelForCausalLM.from_pretrained(server.folder).double()
    for own, given in zip(tokens, found.data):
        with torch.no_grad():
            mean = model(torch.tensor([own]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert given.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    plain = client.embeddings.create(model="small", input=tokens[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(found.data[0].embedding, abs=1e-6)
    assert plain.usage.total_tokens == 4


def test_stop_strings_end_an_answer_before_them(client: Any) -> None:
    settings = {"model": "small", "prompt": "x", "max_tokens": 60, "seed": 5, "logit_bias": {"0": -100}}
    whole = client.completions.create(**settings).choices[0]
    stop = whole.text[20:23]
    place = whole.text.index(stop)
    for stream in (False, True):
        found = client.completions.create(**settings, stop=[stop, "never"], stream=stream)
        pieces = list(found) if stream else [found]
        assert "".join(piece.choices[0].text for piece in pieces) == whole.text[:place]
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_unknown_fields_are_taken_and_said(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 1, "sparkle": 1, "user": "me", "a\nb": 2}
    answer = httpx.post(server.base + TEXT, json=body)
    assert answer.status_code == 200 and answer.headers["x-llm-parallel-ignored"] == "a?b, sparkle"
    httpx.post(server.base + TEXT, json=body)
    assert server.log.count("sparkle") == 1


def test_a_client_that_goes_away_frees_its_pages(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": True, "n": 8}
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with httpx.stream("POST", server.base + TEXT, json={**body, "stream": True}, timeout=0.2) as answer:
                    for _ in zip(range(3), answer.iter_lines()):
                        pass
                    raise httpx.ReadTimeout("left")
            httpx.post(server.base + TEXT, json=body, timeout=0.05)
    wait_until_idle(server)
    assert gauge(server, "pages_used") == gauge(server, "running") == gauge(server, "queue") == 0
    assert gauge(server, 'answers_total{reason="cancelled"}') > 0


def test_a_full_queue_says_when_to_come_back(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": True, "n": 24}
    for _ in range(20):  # this machine may be so slow that the first one is answered before the second one comes
        with httpx.stream("POST", server.base + TEXT, json={**body, "stream": True}):
            refused = httpx.post(server.base + TEXT, json={**body, "max_tokens": 1})
        if refused.status_code == 429:
            break
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    wait_until_idle(server)
    too_many = httpx.post(server.base + TEXT, json={**body, "n": 25})
    assert too_many.status_code == 400 and "24 at a time" in too_many.json()["error"]["message"]


def test_the_context_is_said_with_both_numbers(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="small", prompt="x" * 200, max_tokens=313)
    assert refused.value.code == "context_length_exceeded"
    assert all(number in refused.value.message for number in ("512", "200", "313"))
    filled = client.completions.create(model="small", prompt="x" * 200, max_tokens=312, extra_body={"ignore_eos": True})
    assert filled.usage.completion_tokens == 312


def test_langchain_talks_to_it(server: RunningServer) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        base_url=f"{server.base}/v1", api_key="none", model="small", max_tokens=8, temperature=0, max_retries=0
    )
    whole = chat.invoke("Hello")
    assert whole.usage_metadata["output_tokens"] == 8
    streamed = list(chat.stream("Hello", stream_usage=True))
    assert "".join(piece.content for piece in streamed) == whole.content
    vectors = langchain.OpenAIEmbeddings(
        base_url=f"{server.base}/v1", api_key="none", model="small", check_embedding_ctx_length=False
    ).embed_documents(["a", "b"])
    assert len(vectors) == 2 and len(vectors[0]) == 32


def test_lm_eval_scores_by_it_as_by_transformers(server: RunningServer) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    api = LocalCompletionsAPI(
        base_url=server.base + TEXT, model="small", tokenizer=str(server.folder), tokenizer_backend="huggingface",
        num_concurrent=1, batch_size=2, max_length=CONTEXT,
    )  # fmt: skip
    asked = [("The capital", " of France"), ("Two", " and two")]
    instances = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    found = api.loglikelihood(instances)
    names = sorted(_letters())
    for (context, answer), (total, _) in zip(asked, found):
        tokens = [3 + names.index(letter) for letter in (context + answer).replace(" ", "\u0120")]
        wanted = sum(_log_probs(server, tokens)[len(context) - 1 :])
        assert total == pytest.approx(wanted, abs=1e-3)
    until = Instance("generate_until", {}, ("Hello", {"until": ["\n"], "max_gen_toks": 6, "temperature": 0}), 0)
    assert isinstance(api.generate_until([until])[0], str)


def test_metrics_count_what_was_done(server: RunningServer, client: Any) -> None:
    before = gauge(server, "generated_tokens_total")
    client.completions.create(model="small", prompt="x", max_tokens=7, extra_body={"ignore_eos": True})
    assert gauge(server, "generated_tokens_total") == before + 7
    assert gauge(server, "time_to_first_token_seconds_count") > 0 and gauge(server, "pages_total") == 256


def test_many_clients_at_once_get_what_they_get_alone(client: Any) -> None:
    def ask(number: int) -> str:
        settings = {"model": "small", "prompt": f"{number}", "max_tokens": 12, "seed": number}
        while True:
            try:
                return client.completions.create(**settings).choices[0].text
            except openai.RateLimitError:
                time.sleep(0.05)

    alone = [ask(number) for number in range(12)]
    together = [""] * 12
    threads = [
        threading.Thread(target=lambda number=number: together.__setitem__(number, ask(number))) for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_responses_streamed_are_the_whole_ones(client: Any) -> None:
    settings = {
        "model": "small",
        "input": "Hello",
        "max_output_tokens": 12,
        "temperature": 0,
        "instructions": "Be brief.",
    }
    whole = client.responses.create(**settings)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**settings, stream=True))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type for one in events if one.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    deltas = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert deltas == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens == 12
    history = [{"role": "user", "content": "Hi"}, *whole.output, {"role": "user", "content": "Go on"}]
    assert client.responses.create(**{**settings, "input": history}).output


TOOL = {
    "name": "find",
    "description": "Finds",
    "parameters": {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    },
}


def test_calls_that_are_forced_streamed_and_whole(client: Any) -> None:
    settings = {"model": "small", "messages": MESSAGES, "tools": [{"type": "function", "function": TOOL}], "seed": 2}
    settings |= {"tool_choice": {"type": "function", "function": {"name": "find"}}, "max_completion_tokens": 100}
    (choice,) = client.chat.completions.create(**settings).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "find" and choice.message.content is None
    assert json.loads(call.function.arguments)["n"] in (1, 22)
    deltas, reasons = [], []
    for chunk in client.chat.completions.create(**settings, stream=True):
        deltas += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "tool_calls" and {delta.index for delta in deltas} == {0}
    assert deltas[0].function.name == "find" and deltas[0].id and deltas[0].type == "function"
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    answered = [*MESSAGES, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    assert client.chat.completions.create(model="small", messages=answered, max_tokens=2).choices
    events = list(
        client.responses.create(
            model="small", input="Find", tools=[{"type": "function", **TOOL}], tool_choice="required", stream=True
        )
    )
    (item,) = [one for one in events[-1].response.output if one.type == "function_call"][:1]
    assert item.name == "find" and json.loads(item.arguments).keys() == {"n"}


def test_answers_of_a_given_form(client: Any) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        large: bool

    long = {"max_tokens": 200, "logit_bias": {"0": -100}}
    form = {"type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema(), "strict": True}}
    form["json_schema"]["schema"]["properties"]["name"] |= {"maxLength": 5}
    answer = client.chat.completions.create(model="small", messages=MESSAGES, response_format=form, seed=1, **long)
    assert City.model_validate_json(answer.choices[0].message.content)
    chosen = client.completions.create(model="small", prompt="x", extra_body={"guided_choice": ["yes", "no"]})
    assert chosen.choices[0].text in ("yes", "no") and chosen.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("path", "body", "status", "part"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_are_answered_by_a_sentence(
    server: RunningServer, path: str, body: Any, status: int, part: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.base + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert part in error["message"] and 10 < len(error["message"]) < 400
    assert httpx.get(f"{server.base}/health").status_code == 200


def test_the_chat_page_comes_with_its_policy(server: RunningServer) -> None:
    found = httpx.get(server.base + "/")
    assert found.status_code == 200 and "<!doctype html>" in found.text[:100].lower()
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert found.headers["x-frame-options"] == "DENY"


def test_pages_of_other_origins_and_other_hosts_are_refused(server: RunningServer) -> None:
    for headers in ({"origin": "https://elsewhere.example"}, {"origin": "null"}, {"host": "elsewhere.example"}):
        refused = httpx.post(server.base + TEXT, json=TEXTS, headers=headers)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    own = httpx.post(server.base + TEXT, json={**TEXTS, "max_tokens": 1}, headers={"origin": server.base})
    assert own.status_code == 200
