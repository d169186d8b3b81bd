"""One contender of benchmarks/generate.py, in a process of its own: reads cases as JSON lines, answers with tokens.

    python benchmarks/generation_peers.py KIND FOLDER [GGUF]

KIND is ``ours-fp32``, ``ours-bf16``, ``ours-int8``, ``ours-int4``, ``transformers-fp32``, ``transformers-bf16``,
``llama.cpp`` or ``vllm-bf16``. Only what the contender needs is imported, so that a peer whose requirements exclude
ours runs by the Python of another environment. A line in is {"prompts": [[token]], "samples": n, "new": tokens,
"shares": whether prompts begin alike}; a line out is {"tokens": written tokens, "answers": [[token]] or null, "cache":
null or [mean, largest]}. ``cache``: bytes of pages in use over those of the tokens held, only where "look" is given.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THREADS = 1
MOST = 32
CONTEXT = 320
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def ours(precision: str, folder: str) -> Answer:
    """Our generator."""
    sys.path.insert(0, str(ROOT))
    import torch

    from llm_parallel.generate.engine import Generator, GeneratorOptions
    from llm_parallel.generate.load import load_model
    from llm_parallel.generate.requests import Finished, Request
    from llm_parallel.generate.sampling import Sampling

    torch.set_num_threads(THREADS)
    network = load_model(folder, "cpu", weights=precision).network
    generator = Generator(network, GeneratorOptions(max_running=MOST, cache_tokens=MOST * CONTEXT))

    def answer(case: dict[str, Any]) -> dict[str, Any]:
        generator.refresh()  # so that nothing is left of the round before
        how = Sampling(max_new_tokens=case["new"])
        requests = [
            Request(number, tuple(prompt), how, n=case["samples"]) for number, prompt in enumerate(case["prompts"])
        ]
        for request in requests:
            generator.submit(request)
        finished: list[Finished] = []
        ratios = []
        while not generator.idle:
            finished += generator.tick()
            if case.get("look") and generator.scheduler.num_running:
                ratios.append(page_ratio(generator.scheduler))
        finished.sort(key=lambda one: (one.number, one.sample))
        found = [list(one.tokens) for one in finished]
        cache = [sum(ratios) / len(ratios), max(ratios)] if ratios else None
        return {"tokens": sum(map(len, found)), "answers": found, "cache": cache}

    return answer


def page_ratio(scheduler: Any) -> float:
    """Bytes of the pages in use over those of the tokens held, of which a shared one counts once."""
    size, held = scheduler.limits.page_tokens, dict[int, int]()
    for sequence in (one for wave in scheduler._running for one in wave):
        for number, page in enumerate(sequence.pages):
            tokens = min(max(sequence.computed - number * size, 0), size)
            held[page] = max(held.get(page, 0), tokens)
    return scheduler.pool.used * size / max(sum(held.values()), 1)


def transformers(precision: str, folder: str) -> Answer:
    """model.generate with a static batch; prompts of several lengths are padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    def answer(case: dict[str, Any]) -> dict[str, Any]:
        prompts = [prompt for prompt in case["prompts"] for _ in range(case["samples"])]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options: dict[str, Any] = {"max_new_tokens": case["new"], "do_sample": False, "pad_token_id": 0}
        out = model.generate(tokens, attention_mask=mask, **options)[:, longest:].tolist()
        return {"tokens": sum(map(len, out)), "answers": out, "cache": None}

    return answer


def llama_cpp(gguf: str) -> Answer:
    """llama.cpp's server with continuous batching, asked inside the process, by the file as it is (Q4_1)."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_batch = MOST * CONTEXT, MOST, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)

    def answer(case: dict[str, Any]) -> dict[str, Any]:
        found: list[int] = []

        def ask(prompt: list[int]) -> None:
            asked = {"prompt": prompt, "n_predict": case["new"], "temperature": 0.0, "ignore_eos": True}
            server.handle_completions({**asked, "cache_prompt": case["shares"]}, take)

        def take(said: Any) -> bool:
            if "usage" not in said:
                raise RuntimeError(f"llama.cpp says {said}")
            found.append(said["usage"]["completion_tokens"])
            return False

        prompts = [prompt for prompt in case["prompts"] for _ in range(case["samples"])]
        asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert len(found) == len(prompts)
        return {"tokens": sum(found), "answers": None, "cache": None}

    return answer


def vllm(precision: str, folder: str) -> Answer:
    """vLLM's build for CPUs, eager, in this process."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.update(settings, OMP_NUM_THREADS=str(THREADS), VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    model = LLM(
        model=folder, dtype=dtype, max_model_len=1024, enforce_eager=True, max_num_seqs=MOST, skip_tokenizer_init=True
    )

    def answer(case: dict[str, Any]) -> dict[str, Any]:
        model.reset_prefix_cache()
        how = SamplingParams(temperature=0.0, max_tokens=case["new"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"] for _ in range(case["samples"])]
        out = [list(one.outputs[0].token_ids) for one in model.generate(prompts, how, use_tqdm=False)]
        return {"tokens": sum(map(len, out)), "answers": out, "cache": None}

    return answer


def main() -> None:
    """Loads, says so, and answers until its input ends. What the peers write goes to standard error."""
    kind, folder = sys.argv[1:3]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, _, precision = kind.partition("-")
    if name == "llama.cpp":
        answer = llama_cpp(sys.argv[3])
    else:
        answer = {"ours": ours, "transformers": transformers, "vllm": vllm}[name](precision, folder)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # llama.cpp's threads would be waited for
