"""An installed vLLM as what answers requests, behind the calls of ``Generator``.

vLLM pins its own torch, so it runs in a process of its own, by the Python of any environment that has it, and speaks
through pipes. It gets the model as a Hugging Face folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.generate.requests import Finished, Reason, Request, best_answers

PYTHON_NAME = "LLM_PARALLEL_VLLM_PYTHON"
"""Environment variable that names the Python which has vLLM."""
REASONS = {"stop": Reason.STOP, "length": Reason.LENGTH}
GIB = 1 << 30
END_S = 20.0
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM holds the model: dtype (``float32`` or ``bfloat16``), device (``cpu`` or ``cuda``), tp, pp, and the
    answers that are in work at a time."""

    dtype: str = "float32"
    device: str = "cpu"
    tp: int = 1
    pp: int = 1
    max_running: int = 32

    def arguments(self, folder: Path, model: ModelConfig, stops: bool) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``. stops: whether answers end at texts, for which it needs the tokenizer."""
        return {
            "model": str(folder),
            "dtype": self.dtype,
            "max_model_len": model.max_seq_length_tokens,
            "max_num_seqs": self.max_running,
            "tensor_parallel_size": self.tp,
            "pipeline_parallel_size": self.pp,
            "skip_tokenizer_init": not stops,
            "enforce_eager": self.device == "cpu",  # compiling takes minutes there
            "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from, as ours
            "max_logprobs": 100,
            "enable_prefix_caching": True,
        }


def vllm_python(given: Path | None, environment: Mapping[str, str]) -> str:
    """The Python that has vLLM. Raises UserError if there is none."""
    found = str(given) if given is not None else environment.get(PYTHON_NAME, "")
    if found:
        if not os.access(found, os.X_OK):
            name = "--engine-python" if given is not None else PYTHON_NAME
            raise UserError(f"{name} is {found}, which is no program; give the python of an environment with vLLM")
        return found
    if find_spec("vllm") is None:
        raise UserError(
            "--engine is vllm, and vLLM is not installed beside LLM Parallel; give --engine-python with the python of "
            f"an environment that has it, or set {PYTHON_NAME}"
        )
    return sys.executable


class VllmEngine:
    """Answers requests by vLLM. Draws depend on a request's seed and stream and on the sample, but they are vLLM's
    own. Close it after use.

    python: a Python that has vLLM; folder: the model as a Hugging Face folder; log: what vLLM says. Raises UserError if
    vLLM cannot load the model."""

    def __init__(
        self,
        python: str,
        folder: Path,
        model: ModelConfig,
        options: VllmOptions,
        log: Path,
        environment: Mapping[str, str],
        stops: bool = False,
    ) -> None:
        self._python, self._log, self._model, self._options = python, log, model, options
        self._asked: dict[int, Request] = {}
        self._made: dict[int, list[Finished]] = {}
        self._new: list[dict[str, Any]] = []
        self._num_open = 0
        self._nowhere = tempfile.TemporaryDirectory(prefix="llm-parallel-vllm-")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as written:
            self._process = subprocess.Popen(
                # As a text, since the folder of a script, with our modules, would come before vLLM's own.
                [python, "-c", Path(__file__).with_name("vllm_worker.py").read_text(encoding="utf-8")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                cwd=self._nowhere.name,
                env=self._environment(environment),
                start_new_session=True,
            )
        try:
            self.version = self._exchange(options.arguments(folder.resolve(), model, stops))["version"]
        except BaseException:
            self.close()
            raise

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        model, options = self._model, self._options
        width = model.num_query_groups * (model.head_dim or model.hidden_size // model.num_attention_heads)
        numbers = 2 * model.num_layers * width * options.max_running * model.max_seq_length_tokens
        cache = max(1, min(-(-4 * numbers // GIB), 16))
        kept = {name: value for name, value in given.items() if name not in LAUNCHER_NAMES}
        defaults = {"VLLM_CPU_KVCACHE_SPACE": str(cache), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        return {**defaults, **kept}

    @property
    def idle(self) -> bool:
        """Whether all answers have been returned."""
        return not self._num_open

    @property
    def has_room(self) -> bool:
        """Whether a further request would be in work at once."""
        return self._num_open < self._options.max_running

    def submit(self, request: Request) -> None:
        """Takes a request. Raises UserError for what vLLM is not asked for here."""
        unlike = {
            "structure": request.structure,
            "prompt_log_probs": request.prompt_log_probs,
            "adapter": request.adapter,
        }
        for name, value in {**unlike, "embeds": request.embeds or None}.items():
            if value is not None:
                raise UserError(f"{name} of prompt {request.number} is given, which --engine vllm does not take")
        self._asked[request.number], self._made[request.number] = request, []
        for sample in range(request.num_made):
            name = f"{request.number}/{sample}"
            self._new.append({"id": name, "prompt": list(request.prompt), "sampling": _sampling(request, sample)})
            self._num_open += 1

    def tick(self) -> list[Finished]:
        """Waits until an answer is finished, for about a second; returns all that are. Raises UserError if vLLM refuses
        a request or ends."""
        new, self._new = self._new, []
        given: list[Finished] = []
        for found in self._exchange(new)["finished"]:
            number, sample = map(int, found["id"].split("/")[:2])
            self._num_open -= 1
            request, made = self._asked[number], self._made[number]
            made.append(_finished(request, sample, found))
            if request.num_made == request.n:
                given.append(made[-1])
            if len(made) == request.num_made:
                if request.num_made > request.n:
                    given += best_answers(made, request.n)
                del self._asked[number], self._made[number]
        return given

    def close(self) -> None:
        """Ends vLLM and the processes that it has started."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._nowhere.cleanup()

    def _exchange(self, content: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = b""
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise UserError(f"vLLM ({self._python}) has ended with status {status}; its log is {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"vLLM ({self._python}) has failed: {answer['error']}; its log is {self._log}")
        return answer


def _seed(request: Request, sample: int) -> int:
    """A seed of 63 bits for each answer."""
    text = f"{request.sampling.seed}/{request.draw_stream}/{sample}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _sampling(request: Request, sample: int) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams``."""
    how = request.sampling
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    found = {name: getattr(how, name) for name in names}
    found |= {"max_tokens": how.max_new_tokens, "logprobs": how.top_log_probs, "ignore_eos": True}
    found |= {"stop_token_ids": sorted(request.ends), "detokenize": bool(request.stop), "skip_special_tokens": False}
    if request.stop:
        found["stop"] = list(request.stop)
    if how.temperature:
        found["seed"] = _seed(request, sample)
    if how.logit_bias:
        found["logit_bias"] = {str(token): bias for token, bias in how.logit_bias}
    return found


def _finished(request: Request, sample: int, found: Mapping[str, Any]) -> Finished:
    most = request.sampling.top_log_probs
    top = tuple(tuple((token, value) for token, value in held[:most]) for held in found["top"]) if most else ()
    reason = REASONS.get(found["reason"], Reason.CANCELLED)
    tokens = tuple(found["tokens"])
    return Finished(request.number, sample, tokens, tuple(found["log_probs"]), top or ((),) * len(tokens), reason)
