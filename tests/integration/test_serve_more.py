"""Servers of other kinds: with several adapters, over several processes, of a run that goes on, with keys."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import llm_parallel
from tests.support.malformed import TEXT
from tests.support.served import CONTEXT, running_server, served_folder

httpx = pytest.importorskip("httpx")
peft = pytest.importorskip("peft")
ADAPTERS = {"one": ["q_proj", "v_proj"], "two": ["o_proj", "up_proj", "down_proj"]}
pytestmark = [pytest.mark.slow, pytest.mark.processes]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def written(base: str, model: str | None, prompt: list[int], count: int = 12) -> str:
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "model": model}
    return httpx.post(base + TEXT, json=body, timeout=60).raise_for_status().json()["choices"][0]["text"]


@pytest.mark.parametrize("layout", [[], ["--tp", "2", "--pp", "2"]], ids=["one process", "tp 2, pp 2"])
def test_adapters_are_chosen_by_name_and_share_passes(layout: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llm_parallel.data.tokenizer import load_tokenizer

    folder, models, arguments = served_folder(tmp_path / "base"), {}, []
    tokenizer = load_tokenizer(folder)
    models["base"] = AutoModelForCausalLM.from_pretrained(folder)
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=4 + seed, target_modules=targets, lora_alpha=16, task_type="CAUSAL_LM")
        made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
        with torch.no_grad():
            for parameter_name, parameter in made.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0.0, 0.3)
        made.save_pretrained(tmp_path / name)
        models[name] = made.eval()
        arguments += ["--adapter", f"{name}={tmp_path / name}"]
    prompt = list(range(20, 60))
    wanted = {name: tokenizer.decode([*prompt, *greedy(model, prompt, 12)]) for name, model in models.items()}
    assert len(set(wanted.values())) == 3
    with running_server(folder, [*arguments, *layout, "--cache-tokens", "2048"]) as server:
        found: dict[tuple[str, int], str] = {}

        def ask(name: str, number: int) -> None:
            found[name, number] = written(server.base, name, prompt)

        threads = [threading.Thread(target=ask, args=(name, number)) for number in range(4) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begun = tokenizer.decode(prompt)
        assert {(name, n): begun + text for (name, n), text in found.items()} == {
            (name, n): wanted[name] for name in models for n in range(4)
        }
        listed = httpx.get(f"{server.base}/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["base", "one", "two"]
        assert server.end() == 0, server.log


def test_a_newer_checkpoint_is_taken_up_between_answers(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = served_folder(tmp_path / f"hf{seed}", seed)
        assert llm_parallel("convert", folder, tmp_path / f"run{seed}").returncode == 0
    run, prompt = tmp_path / "run0", list(range(20, 40))
    with running_server(tmp_path / "hf1") as other:
        wanted = written(other.base, None, prompt)
    body = {"prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": True, "stream": True}
    with running_server(run, ["--reload-s", "0.1"]) as server:
        before = written(server.base, None, prompt)
        assert before != wanted
        with httpx.stream("POST", server.base + TEXT, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            shutil.copytree(tmp_path / "run1/checkpoints/iter_0000000", run / "checkpoints/making")
            (run / "checkpoints/making").rename(run / "checkpoints/iter_0000007")
            (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("7")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        until = time.monotonic() + 60
        while "took up" not in server.log and time.monotonic() < until:
            time.sleep(0.05)
        assert written(server.base, None, prompt) == wanted
        assert server.end() == 0 and "iter_0000007" in server.log, server.log


def test_keys_and_an_end_that_finishes_what_runs(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nfirst-secret\nsecond-secret\n")
    long = {"prompt": "secret prompt", "max_tokens": CONTEXT - 20, "ignore_eos": True, "stream": True, "n": 4}
    folder = served_folder(tmp_path / "small")
    arguments = ["--api-key-file", str(keys), "--host", "0.0.0.0", "--log-requests"]
    with running_server(folder, arguments, {"LLM_PARALLEL_API_KEYS": "third"}) as server:
        base = server.base.replace("0.0.0.0", "127.0.0.1")
        for given in (None, "Bearer wrong", "Bearer", "Basic first-secret", "first-secret"):
            headers = {} if given is None else {"authorization": given}
            refused = httpx.get(f"{base}/v1/models", headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("first-secret", "second-secret", "third"):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{base}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{base}/health").status_code == 200
        assert httpx.get(f"{base}/metrics").status_code == 401
        with httpx.stream("POST", base + TEXT, json=long, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            while httpx.get(f"{base}/health").status_code != 503 and time.monotonic() < until:
                time.sleep(0.01)
            refused = httpx.post(base + TEXT, json={"prompt": "x"}, headers=headers)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.end() == 0
        assert "secret" not in server.log and "warning" not in server.log and "/v1/completions 200" in server.log
