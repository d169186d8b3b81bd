"""The way to vLLM and back, with a package ``vllm`` of the test's own in the other Python: what is asked of it, what
becomes of its answers, and what is said when it fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.generate.requests import Finished, Reason, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.structure import Structure
from llm_parallel.generate.vllm_engine import PYTHON_NAME, VllmEngine, VllmOptions, vllm_python

FAKE = '''
import json, os, sys
from types import SimpleNamespace
__version__ = "0.0-fake"
print("vLLM logs to the standard output", flush=True)

def SamplingParams(**given):
    return given

class LLM:
    """Answers a prompt with its tokens plus one, plus the last digit of the seed."""
    def __init__(self, **given):
        if "broken" in given["model"]:
            raise ValueError("no such model")
        json.dump({**given, "kv": os.environ["VLLM_CPU_KVCACHE_SPACE"], "cwd": os.getcwd(), "path": sys.path[0]},
                  open(given["model"] + "/asked.json", "w"))
        self.llm_engine, self.open, self.folder = self, [], given["model"]
    def add_request(self, name, prompt, params):
        if prompt["prompt_token_ids"] == [13]:
            os._exit(9)
        if prompt["prompt_token_ids"] == [14]:
            raise ValueError("it is too long")
        json.dump({**params, "output_kind": str(params["output_kind"])}, open(self.folder + "/sampling.json", "w"))
        self.open.append((name, prompt["prompt_token_ids"], params))
    def has_unfinished_requests(self):
        return bool(self.open)
    def step(self):
        name, prompt, params = self.open.pop()  # the last one first
        tokens = [token + 1 + params.get("seed", 0) % 7 for token in prompt]
        held = lambda t: {0: SimpleNamespace(logprob=-0.5, rank=1), t: SimpleNamespace(logprob=-float(t), rank=5)}
        answer = SimpleNamespace(token_ids=tokens, logprobs=[held(t) for t in tokens],
                                 finish_reason="stop" if tokens[-1] in params["stop_token_ids"] else "length")
        return [SimpleNamespace(request_id=name, outputs=[answer], finished=True)]
'''


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python whose package vllm is the one above."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(FAKE)
    kinds = "class RequestOutputKind:\n    FINAL_ONLY = 'final only'\n"
    (folder / "vllm" / "sampling_params.py").write_text(kinds)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    program.chmod(0o755)
    return str(program)


def opened(python: str, folder: Path, **more: Any) -> VllmEngine:
    folder.mkdir(exist_ok=True)
    model = ModelConfig(vocab_size=100, max_seq_length_tokens=128)
    options = VllmOptions(max_running=3)
    return VllmEngine(python, folder, model, options, folder / "log" / "vllm.log", dict(os.environ), **more)


def answers(engine: VllmEngine) -> list[Finished]:
    found = []
    while not engine.idle:
        found += engine.tick()
    return sorted(found, key=lambda one: (one.number, one.sample))


@pytest.mark.processes
def test_requests_become_vllms_and_its_answers_ours(python: str, tmp_path: Path) -> None:
    engine = opened(python, tmp_path / "model", stops=True)
    try:
        assert engine.version == "0.0-fake" and engine.idle and engine.has_room
        sampling = Sampling(9, 0.7, 5, 0.9, top_log_probs=1, logit_bias=((3, 2.0),))
        engine.submit(Request(4, (1, 2), sampling, frozenset([8, 3]), ("end",), n=2, stream=11))
        engine.submit(Request(2, (2, 7), Sampling(6), frozenset([8])))
        assert not engine.has_room
        first, *drawn = answers(engine)
        assert first == Finished(2, 0, (3, 8), (-3.0, -8.0), ((), ()), Reason.STOP)
        assert [one.sample for one in drawn] == [0, 1] and drawn[0].tokens != drawn[1].tokens
        assert all(one.top == (((0, -0.5),),) * 2 for one in drawn) and not first.truncated
        asked = json.loads((tmp_path / "model" / "sampling.json").read_text())
        assert asked == {
            "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
            "frequency_penalty": 0.0, "presence_penalty": 0.0, "max_tokens": 6, "logprobs": 0, "ignore_eos": True,
            "stop_token_ids": [8], "detokenize": False, "skip_special_tokens": False, "output_kind": "final only",
        }  # fmt: skip

        engine.submit(Request(7, (5,), sampling, n=2, best_of=6))
        every = [Request(7, (5,), sampling, n=6)]
        best = answers(engine)
        engine.submit(every[0])
        made = answers(engine)
        assert [one.log_probs for one in best] == sorted((one.log_probs for one in made), reverse=True)[:2]
        engine.submit(Request(4, (1, 2), sampling, frozenset([8, 3]), ("end",), n=2, stream=11))
        assert answers(engine) == drawn, "the same seed and stream draw the same"
    finally:
        engine.close()
    held = json.loads((tmp_path / "model" / "asked.json").read_text())
    assert held["dtype"] == "float32" and held["max_model_len"] == 128 and held["max_num_seqs"] == 3
    assert held["skip_tokenizer_init"] is False and held["logprobs_mode"] == "processed_logprobs" and held["kv"] == "1"
    assert held["path"] in ("", held["cwd"]) and not Path(held["cwd"]).exists(), "none of our modules comes before its"
    assert "vLLM logs" in (tmp_path / "model" / "log" / "vllm.log").read_text()


@pytest.mark.processes
def test_what_vllm_says_and_its_death_are_passed_on(python: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has failed: ValueError: no such model; its log is .*vllm\.log"):
        opened(python, tmp_path / "broken")
    with pytest.raises(UserError, match=r"has failed: ModuleNotFoundError: No module named 'vllm'"):
        plain = tmp_path / "plain"
        plain.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        plain.chmod(0o755)
        opened(str(plain), tmp_path / "model")
    for token, message in ((13, "has ended with status 9"), (14, "has failed: ValueError: it is too long")):
        engine = opened(python, tmp_path / "model")
        try:
            engine.submit(Request(0, (token,)))
            with pytest.raises(UserError, match=message):
                engine.tick()
        finally:
            engine.close()


@pytest.mark.processes
def test_what_vllm_is_not_asked_for_is_refused(python: str, tmp_path: Path) -> None:
    engine = opened(python, tmp_path / "model")
    try:
        wrong: tuple[dict[str, Any], ...] = (
            {"structure": Structure.regex("a")}, {"prompt_log_probs": 0}, {"embeds": True}, {"adapter": "one"}
        )  # fmt: skip
        for more in wrong:
            with pytest.raises(UserError, match=f"{next(iter(more))} of prompt 3 is given, which --engine vllm"):
                engine.submit(Request(3, (1,), **more))
        assert engine.idle
    finally:
        engine.close()
    for given, part in (
        ({"dp": 2}, "--dp is given with --engine vllm"),
        ({"deterministic": True}, "--deterministic is given with"),
        ({"weights": "int4"}, "--weights int4 is given with"),
        ({"choice": ("a",)}, "a form of answers is given with"),
        ({"engine": "sglang"}, "--engine is 'sglang'; it must be ours or vllm"),
        ({"engine": "ours", "engine_python": Path("x")}, "--engine-python is given without --engine vllm"),
    ):
        with pytest.raises(UserError, match=part):
            GenerateRequest("folder", **{"input": Path("i"), "output": Path("o"), "engine": "vllm", **given})


def test_the_python_that_has_vllm_is_looked_for(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_python(None, {PYTHON_NAME: python}) == python == vllm_python(Path(python), {})
    with pytest.raises(UserError, match="--engine-python is /nowhere, which is no program"):
        vllm_python(Path("/nowhere"), {})
    monkeypatch.setattr("llm_parallel.generate.vllm_engine.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"vLLM is not installed beside LLM Parallel.*{PYTHON_NAME}"):
        vllm_python(None, {})
